"""A member's share of the partitions: where each goes on, and with what it begins."""

import time
from collections.abc import Callable, Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition

from producer.alert import silence, sums_topic
from producer.alert.commit import Place
from producer.alert.evaluate import RETRANSMITS
from producer.alert.model import Alert
from producer.alert.partitions import Committed, Counts, HeartbeatPart, Part, SourcePart, SumsPart
from producer.alert.topics import Topics
from producer.alert.windows import ROOM_BYTES
from producer.config.load import Alert as AlertConfig
from producer.consume.decode import Decoder
from producer.errors import ConfigError, UnavailableError

_ANSWER_S = 10.0


class Shares:
    """Makes the parts of a share. `known` returns the last alerts; decoders and counts are for all parts.

    `from_beginning`: where nothing is committed, from the oldest event on and not from the next.
    """

    def __init__(
        self,
        config: AlertConfig,
        topics: Topics,
        decoder: Decoder,
        counts: Counts,
        known: Callable[[], list[Alert]],
        *,
        from_beginning: bool,
    ) -> None:
        self._config = config
        self._topics = topics
        self._decoder = decoder
        self._counts = counts
        self._known = known
        self._from_beginning = from_beginning

    def partitions(self, consumer: Consumer) -> dict[str, int]:
        """Return how many partitions each topic has. UnavailableError says which is missing."""
        found = consumer.list_topics(timeout=_ANSWER_S).topics
        wanted = [*self._topics.read, *([self._topics.alerts] if self._topics.alerts else [])]
        for topic in wanted:
            if topic not in found or found[topic].error is not None:
                mend = "run `rebpf init`" if topic in self._topics.streams else "run `rebpf init --alerts`"
                raise UnavailableError(f"topic {topic} is missing, or this user may not see it: {mend}")
        counts = {topic: len(found[topic].partitions) for topic in wanted}
        if self._topics.heartbeats and counts[self._topics.heartbeats] != 1:
            raise ConfigError(
                f"topic {self._topics.heartbeats} has {counts[self._topics.heartbeats]} partitions, and silence is "
                "looked for in one: set alert.silent_after to 0"
            )
        return counts

    def take(self, consumer: Consumer, assigned: list[TopicPartition]) -> tuple[dict[Place, Part], set[Place]]:
        """Return the parts of an assignment, and which of them have nothing committed yet."""
        counts = self.partitions(consumer)
        known = self._known()
        parts, fresh = {}, set()
        room_bytes = ROOM_BYTES // max(1, len(assigned))
        for found in consumer.committed(assigned, timeout=_ANSWER_S):
            if found.error is not None:  # what it has is not known, which is not the same as nothing
                raise KafkaException(found.error)
            place = Place(found.topic, found.partition)
            committed = Committed(found.offset, found.metadata or "", time.time_ns())
            if found.offset < 0:
                fresh.add(place)
                committed = Committed(self._first_offset(consumer, place))
            parts[place] = self._part(place, committed, counts, known, room_bytes)
        return parts, fresh

    def _first_offset(self, consumer: Consumer, place: Place) -> int:
        low, high = consumer.get_watermark_offsets(TopicPartition(*place), timeout=_ANSWER_S)
        return low if self._from_beginning or place.topic == self._topics.sums else high

    def _part(
        self, place: Place, committed: Committed, counts: Mapping[str, int], known: list[Alert], room_bytes: int
    ) -> Part:
        topic, number = place
        if topic == self._topics.sums:
            ours = [
                alert
                for alert in known
                if not self._is_silence(alert)
                and sums_topic.partition_of(alert.by, alert.group, counts[topic]) == number
            ]
            sources = [_name(source, each) for source in self._topics.streams for each in range(counts[source])]
            return SumsPart(topic, self._config.rules, sources, ours, committed, self._counts, room_bytes)
        if topic == self._topics.heartbeats:
            silent = [alert for alert in known if self._is_silence(alert)]
            return HeartbeatPart(topic, self._config.silent_after, silent, committed, self._decoder, self._counts)
        stream = self._topics.streams[topic]
        rules = [rule for rule in self._config.rules if stream == RETRANSMITS or rule.measure == "ratio"]
        lateness_s = self._config.lateness_s
        return SourcePart(
            topic, stream, _name(topic, number), rules, lateness_s, committed, self._decoder, self._counts, room_bytes
        )

    def _is_silence(self, alert: Alert) -> bool:
        # Where silence is not looked for any more, what was silent is resolved as any alert whose rule is gone.
        return alert.rule == silence.RULE and self._topics.heartbeats is not None


def _name(topic: str, number: int) -> str:
    return f"{topic}/{number}"
