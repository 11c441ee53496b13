"""Assigned partitions: where to resume each one, and with what state."""

import time
from collections.abc import Callable, Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition

from producer.alert import silence, sums_topic
from producer.alert.commit import PartitionId
from producer.alert.evaluate import RETRANSMITS
from producer.alert.model import Alert
from producer.alert.partitions import Committed, Counts, EventPartition, HeartbeatPartition, Partition, SumsPartition
from producer.alert.topics import Topics
from producer.alert.windows import MEMORY_BYTES
from producer.config.load import Alert as AlertConfig
from producer.consume.decode import Decoder
from producer.errors import ConfigError, UnavailableError

_ANSWER_S = 10.0


class Assigner:
    """Creates the assigned partitions, which share `decoder` and `counts`.

    `from_beginning`: start partitions without a committed offset at their earliest event instead of at their end.
    """

    def __init__(
        self,
        config: AlertConfig,
        topics: Topics,
        decoder: Decoder,
        counts: Counts,
        last_alerts: Callable[[], list[Alert]],
        *,
        from_beginning: bool,
    ) -> None:
        self._config = config
        self._topics = topics
        self._decoder = decoder
        self._counts = counts
        self._last_alerts = last_alerts
        self._from_beginning = from_beginning

    def partition_counts(self, consumer: Consumer) -> dict[str, int]:
        """Return each topic's number of partitions. Raises UnavailableError for a missing topic."""
        found = consumer.list_topics(timeout=_ANSWER_S).topics
        wanted = [*self._topics.read, *([self._topics.alerts] if self._topics.alerts else [])]
        for topic in wanted:
            if topic not in found or found[topic].error is not None:
                fix = "run `rebpf init`" if topic in self._topics.streams else "run `rebpf init --alerts`"
                raise UnavailableError(f"topic {topic} does not exist, or this user may not describe it: {fix}")
        counts = {topic: len(found[topic].partitions) for topic in wanted}
        if self._topics.heartbeats and counts[self._topics.heartbeats] != 1:
            raise ConfigError(
                f"topic {self._topics.heartbeats} has {counts[self._topics.heartbeats]} partitions, but "
                "silence detection needs exactly one: set alert.missed_heartbeats to 0"
            )
        return counts

    def build(
        self, consumer: Consumer, assigned: list[TopicPartition]
    ) -> tuple[dict[PartitionId, Partition], set[PartitionId]]:
        """Return the assigned partitions, and those without a committed offset."""
        counts = self.partition_counts(consumer)
        last_alerts = self._last_alerts()
        partitions, fresh = {}, set()
        memory_bytes = MEMORY_BYTES // max(1, len(assigned))
        for found in consumer.committed(assigned, timeout=_ANSWER_S):
            if found.error is not None:  # an unknown offset is not the same as none
                raise KafkaException(found.error)
            partition_id = PartitionId(found.topic, found.partition)
            committed = Committed(found.offset, found.metadata or "", time.time_ns())
            if found.offset < 0:
                fresh.add(partition_id)
                committed = Committed(self._first_offset(consumer, partition_id))
            partitions[partition_id] = self._partition(partition_id, committed, counts, last_alerts, memory_bytes)
        return partitions, fresh

    def _first_offset(self, consumer: Consumer, partition_id: PartitionId) -> int:
        low, high = consumer.get_watermark_offsets(TopicPartition(*partition_id), timeout=_ANSWER_S)
        return low if self._from_beginning or partition_id.topic == self._topics.sums else high

    def _partition(
        self,
        partition_id: PartitionId,
        committed: Committed,
        counts: Mapping[str, int],
        last_alerts: list[Alert],
        memory_bytes: int,
    ) -> Partition:
        topic, number = partition_id
        if topic == self._topics.sums:
            ours = [
                alert
                for alert in last_alerts
                if not self._is_silence(alert)
                and sums_topic.partition_of(alert.by, alert.group, counts[topic]) == number
            ]
            sources = [_name(source, each) for source in self._topics.streams for each in range(counts[source])]
            return SumsPartition(topic, self._config.rules, sources, ours, committed, self._counts, memory_bytes)
        if topic == self._topics.heartbeats:
            silent = [alert for alert in last_alerts if self._is_silence(alert)]
            return HeartbeatPartition(
                topic, self._config.missed_heartbeats, silent, committed, self._decoder, self._counts
            )
        stream = self._topics.streams[topic]
        rules = [rule for rule in self._config.rules if stream == RETRANSMITS or rule.measure == "ratio"]
        lateness_s = self._config.lateness_s
        return EventPartition(
            topic, stream, _name(topic, number), rules, lateness_s, committed, self._decoder, self._counts, memory_bytes
        )

    def _is_silence(self, alert: Alert) -> bool:
        # With silence detection off, silent hosts are resolved like the alerts of any removed rule.
        return alert.rule == silence.RULE and self._topics.heartbeats is not None


def _name(topic: str, number: int) -> str:
    return f"{topic}/{number}"
