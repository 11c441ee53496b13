"""Writes to a topic, and waits for the acknowledgements."""

from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from producer.alert.retry import Sleep
from producer.errors import UnavailableError
from producer.kafka.confluent import open_client

_POLL_S = 0.1
_AT_ONCE_S = 1.0
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class TopicWriter:
    """Writes to `topic`; `settings` are librdkafka's.

    `sleep` is called while waiting for Kafka; what it raises ends the wait.
    """

    def __init__(self, settings: Mapping[str, str], topic: str, sleep: Sleep) -> None:
        self._settings = settings
        self._topic = topic
        self._sleep = sleep
        self._failure: KafkaError | None = None
        self._client = self._open()

    def put(self, value: bytes, key: bytes) -> None:
        """Queue a message. After a fatal error, replaces the client and raises UnavailableError."""
        while True:
            try:
                self._client.produce(self._topic, value, key, on_delivery=self._on_delivery)
                return
            except BufferError:
                self._sleep(_POLL_S)
                self._client.poll(_POLL_S)
            except KafkaException as exc:
                raise self._replaced(exc) from exc

    def flush(self) -> None:
        """Return when Kafka has acknowledged all queued messages. UnavailableError if it rejects one."""
        try:
            pending = self._client.flush(_AT_ONCE_S)
            while pending:
                self._sleep(_POLL_S)
                pending = self._client.flush(_POLL_S)
        except KafkaException as exc:
            raise self._replaced(exc) from exc
        failure, self._failure = self._failure, None
        if failure is not None:
            raise UnavailableError(f"topic {self._topic}: {failure.str()}")

    def discard(self) -> None:
        """Drop the queued messages."""
        self._client.purge()
        self._client.flush(1)

    def _replaced(self, fatal: KafkaException) -> UnavailableError:
        self.discard()
        self._client, self._failure = self._open(), None
        return UnavailableError(f"topic {self._topic}: {fatal.args[0].str()}")

    def _open(self) -> Producer:
        return open_client(Producer, self._settings)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and error.code() not in _PURGED:
            self._failure = error
