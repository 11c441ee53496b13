"""Follows topics from their end, their beginning or a time on, over its own connection."""

import logging
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import ClusterMetadata

from producer.consume.reader import PartitionId
from producer.host.progress import Progress
from producer.kafka.confluent import is_test_broker, list_topics
from producer.kafka.consumer import QuietConsumer, is_passing, offsets, topic_error

logger = logging.getLogger(__name__)
_METADATA_TIMEOUT_S = 5
_LOOK_S, _LOOK_TIMEOUT_S = 10.0, 1
"""How often to look for new partitions, and how long that may hold up the reading."""
_STILL_S = 300.0
"""Seconds without a message from a partition after which its end is requested.

If it is elsewhere, librdkafka has lost track of the partition: of a topic that was deleted and created again in a
cluster of several brokers, for example. Then a new client reads on.
"""
_POLL_S = 0.1
_BATCH = 1000


class Start(IntEnum):
    """Where to start; any larger number is a time in milliseconds since 1970, if the brokers find messages by time."""

    BEGINNING = OFFSET_BEGINNING
    END = OFFSET_END


class Follower:
    """A consumer of all partitions of the topics; those that do not exist yet will be read from their beginning.

    `purpose` is part of the group id. `poll` returns up to `batch` messages.
    """

    def __init__(
        self,
        brokers: str,
        purpose: str,
        topics: Sequence[str],
        settings: Mapping[str, str],
        *,
        start: int,
        batch: int = _BATCH,
    ) -> None:
        self._brokers, self._purpose, self._settings = brokers, purpose, settings
        self._assigned: dict[str, set[int]] = {topic: set() for topic in topics}
        self._existing: set[tuple[str, int]] = set()
        """The partitions that existed at the start; others are read from their beginning."""
        self._start = start
        self._batch = batch
        self._next_look = 0.0
        self._positions: dict[PartitionId, tuple[int, float]] = {}
        """Where each partition is read, and since when."""
        self._behind: set[PartitionId] = set()
        self._connect()

    def _connect(self) -> None:
        self._connection = QuietConsumer(self._brokers, self._purpose, self._settings, {})
        self._consumer = self._connection.client

    def start(self) -> None:
        """Assign existing partitions; those without a leader once they have one."""
        began_ms = time.time_ns() // 1_000_000
        with self._connection.translated_errors(), Progress(f"connecting to Kafka at {self._brokers}"):
            self._assign_new(_METADATA_TIMEOUT_S, is_start=True)
        if self._start == Start.END:  # of now, for those that are assigned later
            self._start = began_ms
        if missing := self._missing():
            logger.warning("waiting for topics=%s", ",".join(missing))
        leaderless = [f"{topic}/{number}" for topic, number in self._existing if number not in self._assigned[topic]]
        if leaderless:
            logger.warning("waiting for leaders of partitions=%s", ",".join(sorted(leaderless)))

    def poll(self, timeout_s: float = _POLL_S) -> list[Message]:
        """Wait briefly, and return the messages that arrived."""
        if time.monotonic() >= self._next_look:
            try:
                self._assign_new(_LOOK_TIMEOUT_S)
                if lost := self._lost():
                    self._read_again(lost)
            except KafkaException as exc:
                logger.debug("no metadata: %s", exc)
        return [message for message in self._consumer.consume(self._batch, timeout_s) if not self._failed(message)]

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def _missing(self) -> list[str]:
        return [topic for topic, numbers in self._assigned.items() if not numbers]

    def _assign_new(self, timeout_s: float, *, is_start: bool = False) -> None:
        """Assign the partitions that are not assigned yet and have a leader."""
        self._next_look = time.monotonic() + (1 if self._missing() else _LOOK_S)
        new: list[TopicPartition] = []
        for topic, assigned in self._assigned.items():
            found = list_topics(self._consumer, timeout_s, topic)
            metadata = found.topics[topic]
            if metadata.error is None:
                if is_start:
                    self._existing.update((topic, number) for number in metadata.partitions)
                new += [
                    TopicPartition(topic, number, self._first(topic, number, found))
                    for number, each in sorted(metadata.partitions.items())
                    if number not in assigned and each.leader >= 0
                ]
            elif metadata.error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART and not assigned:
                raise topic_error(topic, metadata.error)
        if new:
            self._assign(new)

    def _first(self, topic: str, number: int, found: ClusterMetadata) -> int:
        is_new = (topic, number) not in self._existing
        return Start.BEGINNING if is_new or (self._start > 0 and is_test_broker(found)) else self._start

    def _assign(self, partitions: list[TopicPartition]) -> None:
        asked = [each for each in partitions if each.offset != Start.BEGINNING]
        names = [(each.topic, each.partition) for each in asked]
        # Not OFFSET_END, which is the end at the first fetch, some time later.
        ends = offsets(self._consumer, names, Start.END, _METADATA_TIMEOUT_S)
        found = ends if self._start == Start.END else offsets(self._consumer, names, self._start, _METADATA_TIMEOUT_S)
        for each, name in zip(asked, names, strict=True):
            each.offset = found[name] if found[name] >= 0 else ends[name]
        self._consumer.incremental_assign(partitions)
        for each in partitions:
            self._assigned[each.topic].add(each.partition)
            self._positions[PartitionId(each.topic, each.partition)] = each.offset, time.monotonic()

    def _lost(self) -> dict[PartitionId, int]:
        """Return the partitions that librdkafka no longer follows, and where to continue reading.

        They were also behind at the last look. One that ends before the position is new.
        """
        now = time.monotonic()
        for each in self._consumer.position([TopicPartition(*where) for where in self._positions]):
            where = PartitionId(each.topic, each.partition)
            if each.offset >= 0 and each.offset != self._positions[where][0]:
                self._positions[where] = each.offset, now
        still = {where: at for where, (at, since) in self._positions.items() if at >= 0 and now - since > _STILL_S}
        ends = offsets(self._consumer, still, Start.END, _LOOK_TIMEOUT_S)
        self._positions |= {where: (at, now) for where, at in still.items() if ends[where] == at}
        before, self._behind = self._behind, {where for where, at in still.items() if ends[where] != at}
        lost = sorted(before & self._behind)
        return {where: still[where] if ends[where] > still[where] else Start.BEGINNING for where in lost}

    def _read_again(self, lost: Mapping[PartitionId, int]) -> None:
        """Continue reading with a new client."""
        names = ",".join(f"{topic}/{number}" for topic, number in lost)
        logger.warning("reading again with a new client, since the old one is stuck at partitions=%s", names)
        self._consumer.close()
        self._connect()
        self._positions |= {where: (offset, time.monotonic()) for where, offset in lost.items()}
        self._consumer.incremental_assign(
            [TopicPartition(*where, offset) for where, (offset, _) in self._positions.items()]
        )

    def _failed(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if is_passing(error) or error.code() == KafkaError._PARTITION_EOF:
            return True
        raise topic_error(message.topic(), error)
