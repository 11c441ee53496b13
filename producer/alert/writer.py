"""Puts the sums into the internal topic, and waits until Kafka has them."""

import logging
from collections.abc import Callable, Mapping

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from producer.consumer import client_logger
from producer.errors import ConfigError, UnavailableError

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_AT_ONCE_S = 1.0


class SumsWriter:
    """Writes to `topic`; `settings` are librdkafka's.

    `wait` is called, with seconds, where Kafka takes its time; what it raises ends the waiting.
    """

    def __init__(self, settings: Mapping[str, str], topic: str, wait: Callable[[float], None]) -> None:
        self._topic = topic
        self._wait = wait
        self._failure: KafkaError | None = None
        try:
            self._client = Producer(dict(settings), logger=client_logger(logger))
        except KafkaException as exc:
            raise ConfigError(f"kafka settings: {exc.args[0].str()}") from exc

    def put(self, partition: int, value: bytes) -> None:
        """Queue a message."""
        while True:
            try:
                self._client.produce(self._topic, value, partition=partition, on_delivery=self._on_delivery)
                return
            except BufferError:
                self._wait(_POLL_S)
                self._client.poll(_POLL_S)

    def flush(self) -> None:
        """Return when Kafka has all that was queued. UnavailableError where it refuses a message for good."""
        left = self._client.flush(_AT_ONCE_S)
        while left:
            self._wait(_POLL_S)
            left = self._client.flush(_POLL_S)
        if self._failure is not None:
            raise UnavailableError(f"topic {self._topic}: {self._failure.str()}")

    def close(self) -> None:
        """Give up what is queued."""
        self._client.purge()
        self._client.flush(1)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and error.code() != KafkaError._PURGE_QUEUE:
            self._failure = error
