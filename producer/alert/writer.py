"""Writes to a topic, and waits until Kafka has all of it."""

import logging
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from producer.alert.retry import Wait
from producer.errors import ConfigError, UnavailableError
from producer.kafka.consumer import client_logger

logger = logging.getLogger(__name__)

ANY_PARTITION = -1
"""The partition that the key belongs to."""
_POLL_S = 0.1
_AT_ONCE_S = 1.0
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class TopicWriter:
    """Writes to `topic`; `settings` are librdkafka's.

    `wait` is called where Kafka takes its time; what it raises ends the waiting.
    """

    def __init__(self, settings: Mapping[str, str], topic: str, wait: Wait) -> None:
        self._settings = settings
        self._topic = topic
        self._wait = wait
        self._failure: KafkaError | None = None
        self._client = self._open()

    def put(self, partition: int, value: bytes, key: bytes | None = None) -> None:
        """Queue a message. UnavailableError where the client has met a fatal error: it is replaced."""
        while True:
            try:
                self._client.produce(self._topic, value, key, partition, on_delivery=self._learn)
                return
            except BufferError:
                self._wait(_POLL_S)
                self._client.poll(_POLL_S)
            except KafkaException as exc:
                raise self._replaced(exc) from exc

    def flush(self) -> None:
        """Return when Kafka has all that was queued. UnavailableError where it refuses a message for good."""
        try:
            left = self._client.flush(_AT_ONCE_S)
            while left:
                self._wait(_POLL_S)
                left = self._client.flush(_POLL_S)
        except KafkaException as exc:
            raise self._replaced(exc) from exc
        failure, self._failure = self._failure, None
        if failure is not None:
            raise UnavailableError(f"topic {self._topic}: {failure.str()}")

    def give_up(self) -> None:
        """Send nothing more of what was queued."""
        self._client.purge()
        self._client.flush(1)

    def _replaced(self, fatal: KafkaException) -> UnavailableError:
        self.give_up()
        self._client, self._failure = self._open(), None
        return UnavailableError(f"topic {self._topic}: {fatal.args[0].str()}")

    def _open(self) -> Producer:
        try:
            return Producer(dict(self._settings), logger=client_logger(logger))
        except KafkaException as exc:
            raise ConfigError(f"kafka settings: {exc.args[0].str()}") from exc

    def _learn(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and error.code() not in _PURGED:
            self._failure = error
