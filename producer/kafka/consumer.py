"""A Kafka consumer without side effects: it joins no group, commits nothing, and assigns partitions by hand.

librdkafka requires a group id; it is not used.
"""

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException

from producer.config.librdkafka import consumer_settings
from producer.errors import ConfigError, UnavailableError

logger = logging.getLogger(__name__)


class QuietConsumer:
    """A consumer of `brokers`; `client` is confluent-kafka's. `purpose` is part of the group id.

    `settings` are the user's; `overrides` take precedence. Raises ConfigError if librdkafka rejects them.
    """

    def __init__(self, brokers: str, purpose: str, settings: Mapping[str, str], overrides: Mapping[str, Any]) -> None:
        self._brokers = brokers
        self.last_error: KafkaError | None = None
        """The client's last error."""
        conf = {
            "allow.auto.create.topics": False,
            "auto.offset.reset": "earliest",
            "socket.keepalive.enable": True,
            # We use no transactions, and one that somebody leaves open would hide our messages.
            "isolation.level": "read_uncommitted",
            **consumer_settings(settings),
            "bootstrap.servers": brokers,
            "group.id": f"rebpf-{purpose}-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "error_cb": self._on_error,
            **overrides,
        }
        try:
            self.client = Consumer(conf, logger=client_logger(logger))
        except KafkaException as exc:
            raise ConfigError(f"the Kafka client's settings: {exc.args[0].str()}") from exc

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise UnavailableError if no broker answers."""
        try:
            yield
        except KafkaException as exc:
            reason = self.last_error or exc.args[0]
            raise UnavailableError(f"no answer from Kafka at {self._brokers}: {reason.str()}") from exc

    def _on_error(self, error: KafkaError) -> None:
        repeated = self.last_error is not None and self.last_error.code() == error.code()
        self.last_error = error
        if not repeated:
            logger.warning("kafka: %s", error.str())


def client_logger(parent: logging.Logger) -> logging.Logger:
    """Return librdkafka's logger; silent unless debugging, since it repeats itself while a broker is down."""
    client = parent.getChild("librdkafka")
    client.setLevel(logging.DEBUG if parent.isEnabledFor(logging.DEBUG) else logging.CRITICAL)
    return client
