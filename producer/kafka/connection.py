"""The sink's connection to Kafka: its clients, what they log, and when they are replaced."""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from producer.backoff import BackOff
from producer.config.librdkafka import TEST_BROKER
from producer.config.load import client_files, is_renewed, read_again
from producer.errors import RebpfError
from producer.events import Topic
from producer.health import metrics
from producer.host.log_limit import LogLimit
from producer.kafka.librdkafka import Error, Log, Producer, Reports, SocketCallback
from producer.kafka.wording import REPEAT_LOG_S, in_brackets

logger = logging.getLogger(__name__)

_CLOCK_STEP_NS = 5_000_000_000
_CLOSE_S = 2.0
_ERRORS_S = 120.0
"""Without a broker, librdkafka reports an error at each attempt to connect, which takes at most 30 s by default."""


def rough_utc_offset_ns() -> int:
    """Return UTC minus the monotonic clock, from two readings that may be some time apart."""
    return time.time_ns() - time.monotonic_ns()


class Connection:
    """A client, and from its first use on a second one that sends each message in its own request.

    `on_socket` is called with each socket before it connects, from a thread of librdkafka. `utc_offset_ns` returns UTC
    minus the monotonic clock.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        on_socket: Callable[[int], None],
        utc_offset_ns: Callable[[], int] = rough_utc_offset_ns,
    ) -> None:
        self._settings = settings
        self._files = client_files(settings)
        self._on_socket = on_socket
        self._open_socket = SocketCallback(self._socket)
        self._utc_offset_ns = utc_offset_ns
        self._last_offset_ns = self._utc_offset_ns()
        self._clients: list[Producer] = []
        """The client, and the second one if there is one."""
        self._abandoned: list[object] = []
        """Clients that no thread could close, with what they point to."""
        self._brokers = ""
        self._fatal = ""
        """Why the clients must be replaced."""
        self._replace_at = 0.0
        self._error_at = -math.inf
        self._backoff = BackOff("kafka_client")
        self._log_limit = LogLimit(REPEAT_LOG_S)
        self.last_error: Error | None = None
        """The client's last error, until a message is delivered."""

    def open(self, topics: Mapping[Topic, int]) -> str:
        """Start the client and return the brokers' address. It connects in the background, with unlimited retries.

        `topics`, with their numbers of partitions, are created if this is the test broker.
        """
        self._clients = [self._new()]
        self._brokers = self._settings.get("bootstrap.servers") or self._clients[0].mock_bootstraps()
        if "bootstrap.servers" not in self._settings:
            for topic, partitions in topics.items():
                self._clients[0].mock_topic(topic, partitions)
        return self._brokers

    def produce(self, topic: Topic, messages: NDArray[np.void], *, alone: bool) -> int:
        """Queue messages, `alone` each in its own request; return how many were accepted. The others have `err` set."""
        if alone and len(self._clients) == 1:
            settings = {name: value for name, value in self._settings.items() if name not in TEST_BROKER}
            one_by_one = {"bootstrap.servers": self._brokers, "batch.num.messages": "1", "linger.ms": "0"}
            self._clients.append(Producer({**settings, **one_by_one}, self._open_socket))
        return self._clients[alone].produce(topic, messages)

    def reports(self) -> Iterator[tuple[Reports, bool]]:
        """Yield the delivery reports that have arrived, and whether they are of messages sent alone."""
        for alone, client in enumerate(self._clients):
            for event in client.events(timeout_s=0):
                if isinstance(event, Reports):
                    yield event, bool(alone)
                elif isinstance(event, Error):
                    self._on_error(event)
                else:
                    self._on_log(event)

    def delivered(self) -> None:
        """Note that a message was delivered."""
        self.last_error = None
        self._backoff.reset()

    def give_up(self, reason: str) -> None:
        """Have the clients replaced, unless there is a reason already, or they report errors.

        Without a broker, new ones would deliver no earlier, and send again what has arrived. A test broker is part of
        its client.
        """
        reports_errors = time.monotonic() - self._error_at < _ERRORS_S
        if not self._fatal and not reports_errors and "bootstrap.servers" in self._settings:
            self._fatal, self._replace_at = reason, 0.0
            metrics.retried("kafka_client", 0.0)

    def replace_if_needed(self, memory: Iterable[object]) -> bool:
        """Replace the clients if needed; return whether they were replaced.

        Reasons are a fatal error, a clock set back, `give_up`, and renewed certificates or secrets.
        Messages in flight get no reports then. `memory` is what they point to.
        """
        if self._clock_was_set_back():
            self._fatal, self._replace_at = "the system clock was set back", 0.0
            metrics.retried("kafka_client", 0.0)
        if not self._fatal or time.monotonic() < self._replace_at:
            return False
        logger.error("kafka: replacing the client: %s", self._fatal)
        try:
            files = client_files(self._settings)  # before they are read, so that no change is missed
            self._settings = read_again(self._settings)
            fresh = self._new()
        except RebpfError as error:
            self._replace_at = time.monotonic() + self._backoff.next()
            logger.error("kafka: cannot replace the client: %s", error)
            return False
        old, self._clients = self._clients, [fresh]
        self.last_error, self._fatal, self._files = None, "", files
        self._close(old, memory)
        return True

    def close(self, memory: Iterable[object] = ()) -> None:
        """Close the clients; messages in flight, which point to `memory`, are dropped.

        A client that waits for a name server, which may take a minute, is left to the end of the process.
        """
        clients, self._clients = self._clients, []
        if closing := self._close(clients, memory):
            closing.join(_CLOSE_S)

    def _close(self, clients: list[Producer], memory: Iterable[object]) -> threading.Thread | None:
        """Close clients in a thread, since theirs may sleep, which would block it; None if it cannot be started."""
        pointed_to = list(memory)
        thread = threading.Thread(target=_close_all, args=(clients, pointed_to), name="kafka-close", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("kafka: a client stays open: %s", error)
            self._abandoned += [clients, pointed_to]
            return None
        return thread

    def _new(self) -> Producer:
        return Producer(self._settings, self._open_socket)

    def _socket(self, family: int, kind: int, protocol: int, _: int | None) -> int:
        try:
            with socket.socket(family, kind, protocol) as opened:
                self._on_socket(opened.fileno())
                return opened.detach()
        except Exception as error:  # ctypes would return 0: standard input
            logger.error("kafka: cannot open a socket: %s", str(error) or type(error).__name__)
            return -1

    def _on_error(self, error: Error) -> None:
        self._error_at = time.monotonic()
        metrics.kafka_error(error.name)
        if error.fatal and not self._fatal:
            self._fatal = f"fatal error {error.name}"
            self._replace_at = time.monotonic() + self._backoff.next()
        if not self._fatal and is_renewed(self._settings, self._files):  # librdkafka reads them once
            self._fatal, self._replace_at = "its certificates or secrets were renewed", 0.0
            metrics.retried("kafka_client", 0.0)
        if self._log_limit.allows(f"{error.name} {error.text.partition(': ')[0]}"):  # which names the broker
            logger.warning("kafka: %s error=%s%s", error.text, error.name, in_brackets(error.name, error.text))
        # _ALL_BROKERS_DOWN comes last and is the least specific.
        if not self.last_error or error.name != "_ALL_BROKERS_DOWN":
            self.last_error = error

    def _on_log(self, line: Log) -> None:
        """Log a line of librdkafka, which repeats itself many times a second."""
        level = _level(line)
        if level > logging.DEBUG and not self._log_limit.allows(_kind(line)):
            level = logging.DEBUG
        logger.log(level, "librdkafka %s", line.text)

    def _clock_was_set_back(self) -> bool:
        """Return whether the system clock has jumped back since the last call.

        librdkafka's threads wait until a time of CLOCK_REALTIME, so they would sleep for the difference (issue 2145).
        """
        before, now = self._last_offset_ns, self._utc_offset_ns()
        if before - now > _CLOCK_STEP_NS:
            now = self._utc_offset_ns()  # the thread may have paused between reading the two clocks
        self._last_offset_ns = now
        return "bootstrap.servers" in self._settings and before - now > _CLOCK_STEP_NS


def _close_all(clients: Iterable[Producer], memory: object) -> None:
    """Close clients; `memory` is what they point to, which must live as long as they do."""
    for client in clients:
        client.close()


def _kind(line: Log) -> str:
    """Return what a line shares with its repetitions: the facility and the thread, which belongs to a broker."""
    head, bracket, _ = line.text.partition("]: ")
    return head if bracket else line.text.partition(":")[0]


def _level(line: Log) -> int:
    """Translate syslog's level to Python's. A failed connection is also an error of the client, which is logged."""
    if line.text.startswith("FAIL: "):
        return logging.DEBUG
    return logging.ERROR if line.level <= 3 else logging.WARNING if line.level == 4 else logging.DEBUG
