"""Follows topics from their end, their beginning or a time on, over its own connection."""

import logging
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, KafkaException, Message, TopicPartition

from producer.consume.reader import finds_times
from producer.errors import UnavailableError
from producer.host.progress import Progress
from producer.kafka.consumer import QuietConsumer

_LOG = logging.getLogger(__name__)
_METADATA_TIMEOUT_S = 5
_LOOK_S, _LOOK_TIMEOUT_S = 10.0, 1
"""How often to look for new partitions, and how long that may hold up the reading."""
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
        self._brokers = brokers
        self._assigned: dict[str, set[int]] = {topic: set() for topic in topics}
        self._start = start
        self._batch = batch
        self._next_look = 0.0
        self._connection = QuietConsumer(brokers, purpose, settings, {})
        self._consumer = self._connection.client

    def start(self) -> None:
        """Assign existing partitions."""
        with self._connection.translated_errors(), Progress(f"connecting to Kafka at {self._brokers}"):
            self._assign_new(self._start, _METADATA_TIMEOUT_S)
        if missing := self._missing():
            _LOG.warning("waiting for topics=%s", ",".join(missing))

    def poll(self, timeout_s: float = _POLL_S) -> list[Message]:
        """Wait briefly, and return the messages that arrived."""
        if time.monotonic() >= self._next_look:
            try:
                self._assign_new(Start.BEGINNING, _LOOK_TIMEOUT_S)
            except KafkaException as exc:
                _LOG.debug("no metadata: %s", exc)
        return [message for message in self._consumer.consume(self._batch, timeout_s) if not self._failed(message)]

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def _missing(self) -> list[str]:
        return [topic for topic, numbers in self._assigned.items() if not numbers]

    def _assign_new(self, start: int, timeout_s: float) -> None:
        """Assign the partitions that are not assigned yet."""
        self._next_look = time.monotonic() + (1 if self._missing() else _LOOK_S)
        for topic, assigned in self._assigned.items():
            found = self._consumer.list_topics(topic, timeout=timeout_s)
            metadata = found.topics[topic]
            if metadata.error is None:
                first = Start.BEGINNING if start > 0 and not finds_times(found) else start
                if new := metadata.partitions.keys() - assigned:
                    self._assign([TopicPartition(topic, number, first) for number in sorted(new)])
                    assigned |= new
            elif metadata.error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART and not assigned:
                raise UnavailableError(f"topic {topic}: {metadata.error.str()}")

    def _assign(self, partitions: list[TopicPartition]) -> None:
        if partitions[0].offset > 0:
            partitions = self._consumer.offsets_for_times(partitions, _METADATA_TIMEOUT_S)
        for partition in partitions:
            if partition.offset == Start.END:
                # Not OFFSET_END, which is the end at the first fetch, some time later.
                partition.offset = self._consumer.get_watermark_offsets(partition, _METADATA_TIMEOUT_S)[1]
        self._consumer.incremental_assign(partitions)

    def _failed(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.retriable() or error.code() == KafkaError._PARTITION_EOF:
            return True
        raise UnavailableError(f"topic {message.topic()}: {error.str()}")
