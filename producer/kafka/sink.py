"""The sink: sends encoded batches to Kafka topics, and reports the outcome of each message.

A batch is passed to librdkafka as one array that points into the batch, which is kept until its last delivery report.
A message that fails with a transient error is retried. A broker that rejects a message rejects the whole request; so
after any other error each message is retried in a request by itself. If it is rejected again it is lost, and counted by
the name of the error. What librdkafka retries internally (unavailable brokers, moving leaders) does not show here:
message.timeout.ms is 0, unlimited, because the ring's size is the limit.
"""

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.ma  # numpy.unique imports it at its first call, when descriptors may have run out
from numpy.typing import NDArray

from producer.backoff import BackOff
from producer.config.librdkafka import DEFAULTS, EMBEDDED, EMBEDDED_PARTITIONS, client_settings
from producer.events import EncodedBatch, Stream, Topic
from producer.health import metrics
from producer.host.clock import UtcOffset
from producer.kafka.librdkafka import MESSAGE, Error, Log, Producer, Reports, SocketCallback, check_settings, error_name
from producer.kafka.retry import TRANSIENT, Retry

logger = logging.getLogger(__name__)

# The 64 bits that librdkafka carries per message: the batch's number, and the row in the low bits.
_ROW_BITS = 20
_ROW_MASK = np.uint64((1 << _ROW_BITS) - 1)
_BEAT = (1 << 64 - _ROW_BITS) - 1
"""The batch number of heartbeats."""

_REPEAT_LOG_S = 30.0
_CLOCK_STEP_NS = 5_000_000_000
_HINTS = {
    "_ALL_BROKERS_DOWN": "no answer at kafka.brokers, or the brokers expect another security.protocol",
    "_AUTHENTICATION": "the brokers reject the credentials",
    "_SSL": "a certificate was rejected",
}


def producer_settings(brokers: str | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Return all of the producer's librdkafka settings; ConfigError if librdkafka rejects one of `settings`.

    Settings for consumers only are checked too, since they are in the same file.
    """
    client = client_settings(brokers, settings)
    check_settings(settings, aliases=DEFAULTS)
    return client


@dataclass(slots=True, eq=False)
class Outcome:
    """The results of a stream's messages since the last poll."""

    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Lost messages by the name of the error."""
    done: list[tuple[EncodedBatch, Counter[str]]] = field(default_factory=list)
    """Batches with no message in flight any more, and the losses of each."""


@dataclass(slots=True, eq=False)
class _InFlight:
    batch: EncodedBatch
    open_rows: NDArray[np.bool_]
    alone: NDArray[np.bool_]
    """Rows that are in a request by themselves."""
    open: int
    lost: Counter[str] = field(default_factory=Counter)


Quarantine = Callable[[EncodedBatch, str], None]
"""Receives messages that Kafka has rejected one by one, and the name of the error."""


class KafkaSink:
    """Sends batches and reports the outcomes. At most about `max_in_flight` messages per stream are in flight.

    Streams share only the client: a missing topic of one does not block the other.

    `topics` are by the stream's name. `on_socket` is called with each socket of the client before it connects, from a
    thread of librdkafka. `quarantine` receives lost messages. `utc_offset_ns` returns UTC minus the monotonic clock.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        topics: Mapping[str, Topic],
        *,
        max_in_flight: int = 1 << 15,
        on_socket: Callable[[int], None] = lambda descriptor: None,
        quarantine: Quarantine = lambda batch, error: None,
        heartbeats: Topic | None = None,
        utc_offset_ns: Callable[[], int] | None = None,
    ) -> None:
        self._utc_offset_ns = utc_offset_ns or UtcOffset()
        self._last_offset_ns = self._utc_offset_ns()
        self._heartbeats = heartbeats
        self._beat: tuple[bytes, bytes] | None = None
        """Key and value of the heartbeat in flight."""
        self._beat_at = 0.0
        self._beat_backoff = BackOff("heartbeat", first_s=20, most_s=600)
        self._settings = settings
        self._topics = topics
        self._max_in_flight = max_in_flight
        self._on_socket = on_socket
        self._quarantine = quarantine
        self._open_socket = SocketCallback(self._socket)
        self._batches: dict[int, _InFlight] = {}
        self._batch_numbers: dict[EncodedBatch, int] = {}
        self._next_number = 0
        self._failed: list[Reports] = []
        self._retries = {stream: Retry() for stream in topics}
        self._alone: Counter[str] = Counter()
        """Messages in requests by themselves, by stream."""
        self._single: Producer | None = None
        """A client that sends one message per request; created when first needed."""
        self._fatal = False
        self._reopen_at = 0.0
        self._reopen_backoff = BackOff("kafka_client")
        self._last_logged: dict[str, float] = {}
        """When each kind of problem was logged last."""
        self._unlogged_losses: Counter[tuple[Topic, str]] = Counter()
        self.in_flight: Counter[str] = Counter()
        """Messages in flight by stream."""
        self.last_error: Error | None = None
        """The client's last error, until a message is delivered."""

    def open(self) -> str:
        """Start the client and return the brokers' address. It connects in the background, with unlimited retries."""
        self._producer = Producer(self._settings, self._open_socket)
        self._brokers = self._settings.get("bootstrap.servers") or self._producer.mock_bootstraps()
        if "bootstrap.servers" not in self._settings:
            for topic in self._topics.values():
                self._producer.mock_topic(topic, EMBEDDED_PARTITIONS)
            if self._heartbeats:
                self._producer.mock_topic(self._heartbeats, 1)
        return self._brokers

    def capacity(self, stream: Stream) -> int:
        """Return how many more messages of a stream may be sent now. 0 during retries, to keep the order."""
        if self._retries[stream.name].rows or self._alone[stream.name]:
            return 0
        return max(0, self._max_in_flight - self.in_flight[stream.name])

    def unacknowledged(self, batch: EncodedBatch) -> int:
        """Return how many messages of a batch are still in flight."""
        number = self._batch_numbers.get(batch)
        return 0 if number is None else self._batches[number].open

    def last_error_of(self, stream: str) -> str:
        """Return the name of the error that a stream's messages are retried for, or an empty string."""
        return self._retries[stream].error

    def send(self, batch: EncodedBatch) -> None:
        """Queue a batch. It may be larger than what `room` returned."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._batch_numbers[batch] = number
        self._batches[number] = _InFlight(
            batch, np.ones(len(batch), np.bool_), np.zeros(len(batch), np.bool_), len(batch)
        )
        self.in_flight[batch.stream.name] += len(batch)
        self._produce(number, np.arange(len(batch)))

    def beat(self, key: bytes, value: bytes) -> None:
        """Send a heartbeat, unless the last one is still in flight or has just failed."""
        if self._heartbeats is None or self._beat or time.monotonic() < self._beat_at:
            return
        self._beat = key, value
        message = np.zeros(1, MESSAGE)
        message["payload"], message["len"] = np.frombuffer(value, np.uint8).ctypes.data, len(value)
        message["key"], message["key_len"] = np.frombuffer(key, np.uint8).ctypes.data, len(key)
        message["private"] = _BEAT << _ROW_BITS
        if not self._producer.produce(self._heartbeats, message):
            self._end_beat(int(message["err"][0]))

    @property
    def beating(self) -> bool:
        """Whether a heartbeat is in flight."""
        return self._beat is not None

    def _end_beat(self, code: int) -> None:
        self._beat = None
        if not code:
            self._beat_backoff.reset()
            return
        wait_s = self._beat_backoff.next()
        self._beat_at = time.monotonic() + wait_s
        metrics.kafka_error(error_name(code))
        topic, error = self._heartbeats, error_name(code)
        logger.warning("kafka: heartbeat not accepted topic=%s error=%s wait_s=%.1f", topic, error, wait_s)

    def poll(self) -> dict[str, Outcome]:
        """Process the delivery reports that have arrived, and return the outcomes by stream."""
        outcomes: dict[str, Outcome] = {}
        for stream, retry in self._retries.items():
            # All at once, when nothing else is in flight, to keep their order.
            if retry.rows and retry.count == self.in_flight[stream] and time.monotonic() >= retry.at:
                for number, rows in retry.take().items():
                    self._produce(number, rows)
        failed, self._failed = self._failed, []
        for reports in failed:
            self._report(reports, outcomes)
        for event in chain.from_iterable(client.events(timeout_s=0) for client in self._clients()):
            if isinstance(event, Reports):
                self._report(event, outcomes)
            elif isinstance(event, Error):
                self._on_error(event)
            else:
                level = _level(event)
                # librdkafka repeats itself many times a second.
                if level > logging.DEBUG and not self._may_log(_kind(event)):
                    level = logging.DEBUG
                logger.log(level, "librdkafka %s", event.text)
        if self._unlogged_losses and self._may_log("rejected"):
            for (topic, error), count in self._unlogged_losses.items():
                logger.error("kafka: %d messages rejected and lost topic=%s error=%s", count, topic, error)
            self._unlogged_losses.clear()
        if self._fatal and time.monotonic() >= self._reopen_at:
            self._reopen(f"fatal error {self.last_error.name if self.last_error else ''}")
        if self._clock_was_set_back():
            self._reopen("the system clock was set back")
        return outcomes

    def close(self) -> None:
        """Close the client; messages in flight are dropped."""
        for client in self._clients():
            client.close()

    def _clients(self) -> list[Producer]:
        return [self._producer, self._single] if self._single else [self._producer]

    def _socket(self, family: int, kind: int, protocol: int, _: int | None) -> int:
        try:
            with socket.socket(family, kind, protocol) as opened:
                self._on_socket(opened.fileno())
                return opened.detach()
        except OSError as error:
            logger.error("kafka: cannot open a socket: %s", error)
            return -1

    def _produce(self, number: int, rows: NDArray[np.int64], client: Producer | None = None) -> None:
        batch = self._batches[number].batch
        messages = np.zeros(len(rows), MESSAGE)
        messages["payload"] = batch.starts[rows] + batch.payload.ctypes.data
        messages["len"] = batch.lengths[rows]
        messages["key"] = batch.key_starts[rows] + batch.keys.ctypes.data
        messages["key_len"] = batch.key_lengths[rows]
        messages["private"] = rows + (number << _ROW_BITS)
        if (client or self._producer).produce(self._topics[batch.stream.name], messages) < len(rows):
            failed = messages[messages["err"] != 0]
            self._failed.append(Reports(failed["err"], failed["private"]))

    def _report(self, reports: Reports, outcomes: dict[str, Outcome]) -> None:
        numbers = reports.private >> np.uint64(_ROW_BITS)
        rows = (reports.private & _ROW_MASK).astype(np.int64)
        for number in np.unique(numbers).tolist():
            of_batch = numbers == number
            if number == _BEAT:
                self._end_beat(int(reports.err[of_batch][0]))
                continue
            stream = self._batches[number].batch.stream
            outcome = outcomes.setdefault(stream.name, Outcome())
            for code in np.unique(reports.err[of_batch]).tolist():
                self._on_result(number, rows[of_batch & (reports.err == code)], code, outcome)

    def _on_result(self, number: int, rows: NDArray[np.int64], code: int, outcome: Outcome) -> None:
        """Record that messages of a batch were acknowledged (code 0), must be retried, or are lost."""
        flight = self._batches[number]
        stream = flight.batch.stream.name
        alone = flight.alone[rows]
        if code:
            metrics.kafka_error(error_name(code), len(rows))
        if code and error_name(code) in TRANSIENT:
            self._alone[stream] -= int(alone.sum())
            flight.alone[rows] = False
            self._retry_later(number, rows, error_name(code))
            return
        if code:
            self._retry_one_by_one(number, rows[~alone], error_name(code))
            rows, alone = rows[alone], alone[alone]
        if code and len(rows):
            self._quarantine_rows(flight.batch, rows, error_name(code))
            outcome.lost[error_name(code)] += len(rows)
            flight.lost[error_name(code)] += len(rows)
        elif not code:
            outcome.delivered += len(rows)
            self.last_error = None
            self._retries[stream].error = ""
            self._retries[stream].backoff.reset()
            self._reopen_backoff.reset()
        self._alone[stream] -= int(alone.sum())
        self.in_flight[stream] -= len(rows)
        flight.open_rows[rows] = False
        flight.open -= len(rows)
        if not flight.open:
            del self._batches[number], self._batch_numbers[flight.batch]
            outcome.done.append((flight.batch, flight.lost))

    def _quarantine_rows(self, batch: EncodedBatch, rows: NDArray[np.int64], error: str) -> None:
        self._unlogged_losses[self._topics[batch.stream.name], error] += len(rows)
        self._quarantine(batch.take(rows), error)

    def _retry_one_by_one(self, number: int, rows: NDArray[np.int64], error: str) -> None:
        """Retry each message in its own request: another message of the request may have caused the error."""
        if not len(rows):
            return
        flight = self._batches[number]
        topic = self._topics[flight.batch.stream.name]
        logger.warning("kafka: retrying %d messages one by one topic=%s error=%s", len(rows), topic, error)
        if self._single is None:
            settings = {name: value for name, value in self._settings.items() if name not in EMBEDDED}
            one_by_one = {"bootstrap.servers": self._brokers, "batch.num.messages": "1", "linger.ms": "0"}
            self._single = Producer({**settings, **one_by_one}, self._open_socket)
        flight.alone[rows] = True
        self._alone[flight.batch.stream.name] += len(rows)
        self._produce(number, rows, self._single)

    def _retry_later(self, number: int, rows: NDArray[np.int64], error: str) -> None:
        stream = self._batches[number].batch.stream.name
        retry = self._retries[stream]
        if not retry.rows:
            wait_s, topic = retry.backoff.next(), self._topics[stream]
            retry.at = time.monotonic() + wait_s
            logger.warning("kafka: retrying messages topic=%s error=%s wait_s=%.1f", topic, error, wait_s)
        retry.add(number, rows, error)

    def _on_error(self, error: Error) -> None:
        metrics.kafka_error(error.name)
        if error.fatal and not self._fatal:
            self._reopen_at = time.monotonic() + self._reopen_backoff.next()
        if self._may_log(error.name):
            hint = _HINTS.get(error.name, "")
            logger.warning("kafka: %s error=%s%s", error.text, error.name, hint and f" ({hint})")
        # _ALL_BROKERS_DOWN comes last and is the least specific.
        if not self.last_error or error.name != "_ALL_BROKERS_DOWN":
            self.last_error = error
        self._fatal |= error.fatal

    def _may_log(self, kind: str) -> bool:
        """Return whether this kind of problem has not been logged for a while."""
        now = time.monotonic()
        if now < self._last_logged.get(kind, now - _REPEAT_LOG_S) + _REPEAT_LOG_S:
            return False
        self._last_logged[kind] = now
        return True

    def _clock_was_set_back(self) -> bool:
        """Return whether the system clock has jumped back since the last call.

        librdkafka's threads wait until a time of CLOCK_REALTIME, so they would sleep for the difference (issue 2145).
        """
        before, self._last_offset_ns = self._last_offset_ns, self._utc_offset_ns()
        return "bootstrap.servers" in self._settings and before - self._last_offset_ns > _CLOCK_STEP_NS

    def _reopen(self, reason: str) -> None:
        """Replace the client, and send everything that is not acknowledged with the new one."""
        logger.error("kafka: replacing the client: %s", reason)
        # In the background: threads that sleep would block it. The old client still points into batches and heartbeat.
        clients, memory = self._clients(), (list(self._batches.values()), self._beat)
        threading.Thread(target=_close_all, args=(clients, memory), name="kafka-close", daemon=True).start()
        self._producer, self._single = Producer(self._settings, self._open_socket), None
        self.last_error, self._fatal, self._failed = None, False, []
        self._alone.clear()
        self._beat = None
        for retry in self._retries.values():
            retry.take()
        for number, flight in sorted(self._batches.items()):
            flight.alone[:] = False
            self._produce(number, np.flatnonzero(flight.open_rows))


def _close_all(clients: list[Producer], memory: object) -> None:
    """Close clients; `memory` is what they point to, which must live as long as they do."""
    for client in clients:
        client.close()


def _kind(line: Log) -> str:
    """Return what a line shares with its repetitions: the facility and the thread, which belongs to a broker."""
    head, bracket, _ = line.text.partition("]: ")
    return head if bracket else line.text.partition(":")[0]


def _level(line: Log) -> int:
    """Translate syslog's level to Python's."""
    return logging.ERROR if line.level <= 3 else logging.WARNING if line.level == 4 else logging.DEBUG
