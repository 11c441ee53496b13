"""confluent-kafka's clients: one way to open them, and one to word their errors."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata

from producer.errors import ConfigError, PermissionDenied, RebpfError, Stopped, UnavailableError
from producer.host import signals
from producer.host.exhausted import check_threads
from producer.host.log_limit import LogLimit
from producer.kafka.wording import REPEAT_LOG_S, fix, in_brackets, is_tls

logger = logging.getLogger(__name__)

Client = TypeVar("Client")
_NO_ANSWER = frozenset({"_ALL_BROKERS_DOWN", "_TRANSPORT", "_TIMED_OUT", "_RESOLVE"})
_WAIT_S = 0.5
_TEST_CLUSTER = "mockCluster"
"""How the id of the in-process test broker begins."""
NEEDS_KAFKA = "this is the in-process test broker of `rebpf run`, which creates no topics: use a real Kafka"


def is_test_broker(found: ClusterMetadata) -> bool:
    """Return whether this cluster is the in-process test broker."""
    return (found.cluster_id or "").startswith(_TEST_CLUSTER)


def open_client(kind: Callable[..., Client], settings: Mapping[str, Any]) -> Client:
    """Return a client of confluent-kafka. Raises ConfigError for settings that librdkafka rejects.

    Its log is silent unless debugging, since librdkafka repeats itself while a broker is down.
    """
    client_logger = logger.getChild("librdkafka")
    client_logger.setLevel(logging.DEBUG if logger.isEnabledFor(logging.DEBUG) else logging.CRITICAL)
    check_threads()
    try:
        return kind(dict(settings), logger=client_logger)
    except KafkaException as error:
        reason = error.args[0].str().strip()
        named = re.search(r'property:? "([\w.]+)"', reason)
        name = f".{named[1]}" if named and named[1] in settings else ""  # librdkafka replaces aliases
        raise ConfigError(f"kafka.settings{name}: {reason}") from error


def list_topics(client: Consumer | AdminClient, timeout_s: float, topic: str | None = None) -> ClusterMetadata:
    """Return the metadata of a topic, or of all. Raises KafkaException, or Stopped if a signal ends the wait.

    Signals are handled only between two calls of the library, so it waits for a broker in several short calls.
    """
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > _WAIT_S:
        try:
            return client.list_topics(topic, timeout=_WAIT_S)
        except KafkaException as error:
            if error.args[0].code() == KafkaError._TIMED_OUT:  # from a broker that is connected, but slow
                break
            if error.args[0].code() != KafkaError._TRANSPORT:
                raise
            if signals.is_stopping():
                raise Stopped("stopped while waiting for Kafka") from error
    return client.list_topics(topic, timeout=max(left_s, _WAIT_S))


class ClientErrors:
    """The errors of a client of `brokers`: pass it as error_cb. With `log`, they are logged, each kind rarely."""

    def __init__(self, brokers: str, *, log: bool) -> None:
        self._brokers = brokers
        self._log_limit = LogLimit(REPEAT_LOG_S) if log else None
        self._last: KafkaError | None = None

    def __call__(self, error: KafkaError) -> None:
        """Remember an error. _ALL_BROKERS_DOWN comes last and is the least specific."""
        if self._last is None or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._last = error
        if self._log_limit and self._log_limit.allows(error.name()):
            logger.warning("kafka: %s error=%s%s", error.str(), error.name(), in_brackets(error.name(), error.str()))

    @property
    def reason(self) -> str:
        """The last error, to be appended to a message; empty if there was none."""
        return f": {self._last.str()}" if self._last else ""

    def worded(self, exception: KafkaException) -> RebpfError:
        """Return the error to raise for an exception of the client, with the fix."""
        error = self._last or exception.args[0]
        name, where, reason = error.name(), f"Kafka at {self._brokers}", error.str()
        advice = fix(name, reason) and f"; {fix(name, reason)}"
        if name == "_AUTHENTICATION":
            return PermissionDenied(f"{where} rejects the authentication: {reason}{advice}")
        if is_tls(name, reason):
            return UnavailableError(f"TLS with {where} failed: {reason}{advice}")
        return UnavailableError(f"{'no response from ' if name in _NO_ANSWER else ''}{where}: {reason}{advice}")
