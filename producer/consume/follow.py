"""Follows topics from their end, their beginning or a time on, over its own connection."""

import logging
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, KafkaException, Message, TopicPartition

from producer.errors import UnavailableError
from producer.host.progress import Progress
from producer.kafka.confluent import is_test_broker
from producer.kafka.consumer import QuietConsumer

_LOG = logging.getLogger(__name__)
_METADATA_TIMEOUT_S = 5
_POLL_S = 0.1
_BATCH = 1000


class Start(IntEnum):
    """Where to start; any larger number is a time in milliseconds since 1970, if the brokers find messages by time."""

    BEGINNING = OFFSET_BEGINNING
    END = OFFSET_END


class Follower:
    """A consumer of all partitions of the topics, including topics that do not exist yet.

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
        self._missing = list(topics)
        self._start = start
        self._batch = batch
        self._next_check = 0.0
        self._connection = QuietConsumer(brokers, purpose, settings, {})
        self._consumer = self._connection.client

    def start(self) -> None:
        """Assign existing partitions."""
        with self._connection.translated_errors(), Progress(f"connecting to Kafka at {self._brokers}"):
            self._assign_existing(self._start)
        if self._missing:
            _LOG.warning("waiting for topics=%s", ",".join(self._missing))

    def poll(self, timeout_s: float = _POLL_S) -> list[Message]:
        """Wait briefly, and return the messages that arrived."""
        if self._missing and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + 1
            try:
                self._assign_existing(Start.BEGINNING)
            except KafkaException as exc:
                _LOG.debug("no metadata: %s", exc)
        return [message for message in self._consumer.consume(self._batch, timeout_s) if not self._failed(message)]

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def _assign_existing(self, start: int) -> None:
        for topic in list(self._missing):
            found = self._consumer.list_topics(topic, timeout=_METADATA_TIMEOUT_S)
            metadata = found.topics[topic]
            if metadata.error is None:
                if start > 0 and is_test_broker(found):
                    start = Start.BEGINNING
                partitions = [TopicPartition(topic, number, start) for number in metadata.partitions]
                if start > 0:
                    partitions = self._consumer.offsets_for_times(partitions, _METADATA_TIMEOUT_S)
                for partition in partitions:
                    if partition.offset == Start.END:
                        # Not OFFSET_END, which is the end at the first fetch, some time later.
                        partition.offset = self._consumer.get_watermark_offsets(partition, _METADATA_TIMEOUT_S)[1]
                self._consumer.incremental_assign(partitions)
                self._missing.remove(topic)
            elif metadata.error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise UnavailableError(f"topic {topic}: {metadata.error.str()}")

    def _failed(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.retriable() or error.code() == KafkaError._PARTITION_EOF:
            return True
        raise UnavailableError(f"topic {message.topic()}: {error.str()}")
