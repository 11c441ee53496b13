"""Writes alerts to the topic tcp_alerts, and waits for the acknowledgements."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from producer.alert.model import Alert, Sink
from producer.alert.record import AlertEncoder
from producer.alert.retry import Sleep, retry_until_available
from producer.errors import UnavailableError
from producer.kafka.confluent import open_client
from producer.kafka.wording import may_not_write

_POLL_S = 0.1
_AT_ONCE_S = 1.0
_SILENT_S = 300.0
"""The client is replaced then, as the producer's: it may wait for a partition's leader for good."""
_FORBIDDEN = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})
"""The second one if a user may not write to any topic: brokers then refuse it a producer id."""
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class TopicSink(Sink):
    """Writes to `topic`, which is compacted and keeps the last alert of each group; `settings` are librdkafka's.

    `sleep` is called while waiting for Kafka and between retries; what it raises ends them.
    """

    def __init__(self, settings: Mapping[str, str], topic: str, encoder: AlertEncoder, sleep: Sleep) -> None:
        self._settings, self._topic, self._encoder, self._sleep = settings, topic, encoder, sleep
        self._failure: KafkaError | None = None
        self._client = open_client(Producer, settings)

    def send(self, alerts: Sequence[Alert]) -> None:
        """Return when Kafka has acknowledged all. If it rejects one, all are resent, to keep their order."""
        messages = [self._encoder.encode(alert, time.time()) for alert in alerts]
        retry_until_available("alerts", self._sleep)(self._write, messages)

    def close(self) -> None:
        """Drop what is in flight."""
        self._client.purge()
        with suppress(KafkaException, SystemError):  # of a client that has failed for good
            self._client.flush(1)

    def _write(self, messages: Sequence[tuple[bytes, bytes]]) -> None:
        """Write messages. Raises UnavailableError if Kafka rejects one, or the client must be replaced."""
        self._failure = None
        try:
            for key, value in messages:
                self._put(key, value)
            end_s = time.monotonic() + _SILENT_S
            while self._client.flush(_AT_ONCE_S):
                if time.monotonic() > end_s:
                    raise KafkaException(KafkaError(KafkaError._MSG_TIMED_OUT))
                self._sleep(_POLL_S)
        except BaseException as error:
            # The next active member or the next retry sends them; they must not arrive later from here.
            self.close()
            # confluent-kafka calls on_delivery with a fatal error pending, which makes it a SystemError.
            cause = error.__cause__ if isinstance(error, SystemError) else error
            if not isinstance(cause, KafkaException):
                raise
            self._client = open_client(Producer, self._settings)
            raise self._worded(cause.args[0]) from error
        if self._failure is not None:
            raise self._worded(self._failure)

    def _worded(self, error: KafkaError) -> UnavailableError:
        text = may_not_write(self._topic) if error.code() in _FORBIDDEN else error.str()
        return UnavailableError(f"topic {self._topic}: {text}")

    def _put(self, key: bytes, value: bytes) -> None:
        while True:
            try:
                self._client.produce(self._topic, value, key, on_delivery=self._on_delivery)
                return
            except BufferError:
                self._sleep(_POLL_S)
                self._client.poll(_POLL_S)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and error.code() not in _PURGED:
            self._failure = error
