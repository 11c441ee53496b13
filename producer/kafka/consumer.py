"""A Kafka consumer that nobody else notices: no group moves, nothing is committed, all partitions are assigned by hand.

A group id is needed and never used.
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
    """Opens a consumer of `brokers` for `purpose`, which is a part of its group's id; `client` is confluent-kafka's.

    `settings` are the user's, and `overrides` win over them. Raises ConfigError where librdkafka refuses them.
    """

    def __init__(self, brokers: str, purpose: str, settings: Mapping[str, str], overrides: Mapping[str, Any]) -> None:
        self._brokers = brokers
        self.last_error: KafkaError | None = None
        """The client's last error."""
        conf = {
            "allow.auto.create.topics": False,
            "auto.offset.reset": "earliest",
            "socket.keepalive.enable": True,
            # Ours are in no transaction, and one that somebody leaves open would hide them.
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
        """Translate what is raised where no broker answers."""
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
    """Return librdkafka's logger, for debugging only: it repeats itself many times a second while a broker is down."""
    client = parent.getChild("librdkafka")
    client.setLevel(logging.DEBUG if parent.isEnabledFor(logging.DEBUG) else logging.CRITICAL)
    return client
