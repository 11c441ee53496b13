"""The part of librdkafka's C API that the sink uses, through ctypes on the library inside confluent-kafka.

confluent-kafka's Producer needs a Python call per message and another per delivery report. The C API takes an array of
messages and returns delivery reports in arrays, which native code fills and reads.

Functions and structures: librdkafka's rdkafka.h and rdkafka_mock.h. Pointers are integers here.
"""

import ctypes
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import confluent_kafka  # noqa: F401  # loads the library
import numpy as np
from numpy.typing import NDArray

from producer import _native
from producer.config.convert import nearest
from producer.config.librdkafka import TEST_BROKER, unreadable
from producer.errors import ConfigError, UnavailableError
from producer.events import Ints
from producer.host import signals
from producer.host.exhausted import check_descriptors, check_threads

# struct rd_kafka_message_s
MESSAGE = np.dtype(
    [
        ("err", "<i4"), ("_pad0", "<u4"), ("rkt", "<u8"), ("partition", "<i4"), ("_pad1", "<u4"), ("payload", "<u8"),
        ("len", "<u8"), ("key", "<u8"), ("key_len", "<u8"), ("offset", "<i8"), ("private", "<u8"),
    ]
)  # fmt: skip

EVENT_DR, EVENT_LOG, EVENT_ERROR = 0x1, 0x4, 0x8
PARTITION_UA = -1
_PRODUCER = 0
_CONF_OK, _CONF_UNKNOWN = 0, -2
_PURGE_QUEUE, _PURGE_INFLIGHT = 1, 2
_ERROR_BYTES = 512
_MOCK_DESCRIPTORS = 16
"""Enough for the client and its mock cluster: with only two, librdkafka aborts the process, and with up to ten, it does
not connect.
"""

SocketCallback = CFUNCTYPE(c_int, c_int, c_int, c_int, c_void_p)
"""int (domain, type, protocol, opaque): opens a socket and returns its descriptor. Called from librdkafka's threads."""


def _library() -> ctypes.CDLL:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        path = next((line.split(maxsplit=5)[5].strip() for line in maps if "librdkafka" in line), None)
    if path is None:
        raise UnavailableError("confluent-kafka does not use a shared librdkafka here: install the wheel from PyPI")
    return ctypes.CDLL(path)


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    text = (c_char_p, c_size_t)
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "conf_new": (c_void_p, ()),
        "conf_set": (c_int, (c_void_p, c_char_p, c_char_p, *text)),
        "conf_set_events": (None, (c_void_p, c_int)),
        "conf_set_socket_cb": (None, (c_void_p, SocketCallback)),
        "conf_destroy": (None, (c_void_p,)),
        "conf_dump": (POINTER(c_char_p), (c_void_p, POINTER(c_size_t))),
        "conf_dump_free": (None, (POINTER(c_char_p), c_size_t)),
        "new": (c_void_p, (c_int, c_void_p, *text)),
        "topic_new": (c_void_p, (c_void_p, c_char_p, c_void_p)),
        "topic_destroy": (None, (c_void_p,)),
        "produce_batch": (c_int, (c_void_p, c_int, c_int, c_void_p, c_int)),
        "queue_get_main": (c_void_p, (c_void_p,)),
        "queue_destroy": (None, (c_void_p,)),
        "queue_poll": (c_void_p, (c_void_p, c_int)),
        "set_log_queue": (c_int, (c_void_p, c_void_p)),
        "event_type": (c_int, (c_void_p,)),
        "event_message_count": (c_size_t, (c_void_p,)),
        "event_message_array": (c_size_t, (c_void_p, c_void_p, c_size_t)),
        "event_error": (c_int, (c_void_p,)),
        "event_error_string": (c_char_p, (c_void_p,)),
        "event_error_is_fatal": (c_int, (c_void_p,)),
        "event_log": (c_int, (c_void_p, POINTER(c_char_p), POINTER(c_char_p), POINTER(c_int))),
        "event_destroy": (None, (c_void_p,)),
        "err2name": (c_char_p, (c_int,)),
        "purge": (c_int, (c_void_p, c_int)),
        "destroy": (None, (c_void_p,)),
        "handle_mock_cluster": (c_void_p, (c_void_p,)),
        "mock_cluster_bootstraps": (c_char_p, (c_void_p,)),
        "mock_topic_create": (c_int, (c_void_p, c_char_p, c_int, c_int)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, f"rd_kafka_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


_lib = _declare(_library())


def error_name(code: int) -> str:
    """Return librdkafka's name of an error code: MSG_SIZE_TOO_LARGE; internal codes begin with an underscore.

    All codes that it does not know are UNKNOWN, since a broker may send any.
    """
    name = str(_lib.rd_kafka_err2name(code).decode())
    return "UNKNOWN" if name.endswith("?") else name


def _reason(text: "ctypes.Array[ctypes.c_char]") -> str:
    """Return the library's error, which quotes the user's value, cut off anywhere."""
    return text.value.decode(errors="replace").strip()


def check_loopback() -> None:
    """Raise UnavailableError if there is no address for the mock cluster: librdkafka would abort the process."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
    except OSError as error:
        why = f"the test broker cannot listen on 127.0.0.1: {error.strerror}"
        raise UnavailableError(
            f"{why}: set kafka.brokers, or add the address: ip addr add 127.0.0.1/8 dev lo"
        ) from error


def check_settings(settings: Mapping[str, str], aliases: Iterable[str]) -> None:
    """Raise ConfigError for the first setting that librdkafka rejects; for an unknown one, with the nearest name.

    `aliases` are valid names that the library does not list.
    """
    _lib.rd_kafka_conf_destroy(_new_conf(settings, aliases))


def _new_conf(settings: Mapping[str, str], aliases: Iterable[str] = ()) -> int:
    text = ctypes.create_string_buffer(_ERROR_BYTES)
    conf: int = _lib.rd_kafka_conf_new()
    for name, value in settings.items():
        result = _lib.rd_kafka_conf_set(conf, name.encode(), value.encode(), text, len(text))
        if result != _CONF_OK:
            hint = nearest(name, [*aliases, *_names(conf)]) if result == _CONF_UNKNOWN else ""
            _lib.rd_kafka_conf_destroy(conf)
            raise ConfigError(f"kafka.settings.{name}: {_reason(text)}{hint}")
    return conf


def _names(conf: int) -> list[str]:
    """Return the names of all settings that have a value."""
    count = c_size_t()
    pairs = _lib.rd_kafka_conf_dump(conf, ctypes.byref(count))
    names = [pairs[i].decode() for i in range(0, count.value, 2)]
    _lib.rd_kafka_conf_dump_free(pairs, count)
    return names


@dataclass(frozen=True, slots=True, eq=False)
class Reports:
    """Delivery reports, in runs of one batch and one result."""

    rows: Ints
    """The messages' rows in their batches, shape (n,)."""
    runs: Sequence[tuple[int, int, int, int]]
    """The batch's number, the error's code (0: acknowledged), and the run's first and end index in `rows`."""


@dataclass(frozen=True, slots=True)
class Error:
    """An error of the client as a whole: a broker that is down, rejected credentials."""

    name: str
    """librdkafka's name of its code."""
    text: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Log:
    """A line of librdkafka's log; `level` is syslog's: 3 is error, 7 debug."""

    level: int
    text: str


Event = Reports | Error | Log


class Producer:
    """A librdkafka producer. Raises ConfigError for settings that librdkafka rejects.

    `open_socket` opens each socket of the client and returns its descriptor. Messages are not copied: keep their arrays
    until the delivery reports have arrived.
    """

    def __init__(self, settings: Mapping[str, str], open_socket: "ctypes._FuncPointer | None" = None) -> None:
        check_threads()
        if TEST_BROKER.keys() <= settings.keys():
            check_descriptors(_MOCK_DESCRIPTORS)
            check_loopback()
        text = ctypes.create_string_buffer(_ERROR_BYTES)
        conf = _new_conf({**settings, "log.queue": "true"})
        _lib.rd_kafka_conf_set_events(conf, EVENT_DR | EVENT_LOG | EVENT_ERROR)
        if open_socket is not None:
            _lib.rd_kafka_conf_set_socket_cb(conf, open_socket)
        self._open_socket = open_socket  # the library calls it until the producer is closed
        with signals.blocked():  # the test broker ends if a signal interrupts its thread
            self._handle = _lib.rd_kafka_new(_PRODUCER, conf, text, len(text))
        if not self._handle:
            _lib.rd_kafka_conf_destroy(conf)
            raise ConfigError(unreadable(settings) or f"kafka.settings: {_reason(text)}")
        _lib.rd_kafka_set_log_queue(self._handle, None)
        self._queue = _lib.rd_kafka_queue_get_main(self._handle)
        self._topics: dict[str, int] = {}
        self._event: int | None = None
        """An event that is not done."""
        self._pointers: NDArray[np.uint64] | None = None
        """Its messages, which the library returns only once."""

    def mock_bootstraps(self) -> str:
        """Return the address of the mock cluster that the setting test.mock.num.brokers started in this process."""
        return str(_lib.rd_kafka_mock_cluster_bootstraps(_lib.rd_kafka_handle_mock_cluster(self._handle)).decode())

    def mock_topic(self, topic: str, partitions: int) -> None:
        """Create a topic in the mock cluster."""
        _lib.rd_kafka_mock_topic_create(_lib.rd_kafka_handle_mock_cluster(self._handle), topic.encode(), partitions, 1)

    def produce(self, topic: str, messages: NDArray[np.void]) -> int:
        """Queue messages, a C-contiguous array of MESSAGE; return how many were accepted. The others have `err` set."""
        if topic not in self._topics:
            self._topics[topic] = _lib.rd_kafka_topic_new(self._handle, topic.encode(), None)
        return int(
            _lib.rd_kafka_produce_batch(self._topics[topic], PARTITION_UA, 0, messages.ctypes.data, len(messages))
        )

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Yield events; wait up to `timeout_s` for the first. If the caller fails, the next call yields it again."""
        wait_ms = int(timeout_s * 1000)
        while event := self._event or _lib.rd_kafka_queue_poll(self._queue, wait_ms):
            self._event, wait_ms = event, 0
            if found := self._read(event):
                yield found
            self._event = self._pointers = None
            _lib.rd_kafka_event_destroy(event)

    def _read(self, event: int) -> Event | None:
        kind = _lib.rd_kafka_event_type(event)
        if kind == EVENT_DR:
            if self._pointers is None:
                pointers = np.empty(_lib.rd_kafka_event_message_count(event), np.uint64)
                _lib.rd_kafka_event_message_array(event, pointers.ctypes.data, len(pointers))
                self._pointers = pointers
            return _reports(self._pointers)
        if kind == EVENT_ERROR:
            return _error(event)
        return _log(event) if kind == EVENT_LOG else None

    def close(self) -> None:
        """Drop queued messages and those in flight, and destroy the client."""
        _lib.rd_kafka_purge(self._handle, _PURGE_QUEUE | _PURGE_INFLIGHT)
        for _ in self.events(0.1):
            pass
        for topic in self._topics.values():
            _lib.rd_kafka_topic_destroy(topic)
        _lib.rd_kafka_queue_destroy(self._queue)
        _lib.rd_kafka_destroy(self._handle)


def _reports(pointers: NDArray[np.uint64]) -> Reports:
    rows = np.empty(len(pointers), np.int64)
    return Reports(rows, _native.reports(pointers, rows))


def rejected(messages: NDArray[np.void]) -> Reports:
    """Return reports of the messages that `Producer.produce` did not accept."""
    indexes = np.flatnonzero(messages["err"]).astype(np.uint64)
    return _reports(messages.ctypes.data + indexes * np.uint64(MESSAGE.itemsize))


def _error(event: int) -> Error:
    return Error(
        error_name(_lib.rd_kafka_event_error(event)),
        (_lib.rd_kafka_event_error_string(event) or b"").decode(errors="replace"),
        bool(_lib.rd_kafka_event_error_is_fatal(event)),
    )


def _log(event: int) -> Log:
    facility, text, level = c_char_p(), c_char_p(), c_int()
    _lib.rd_kafka_event_log(event, ctypes.byref(facility), ctypes.byref(text), ctypes.byref(level))
    return Log(level.value, f"{(facility.value or b'').decode()}: {(text.value or b'').decode(errors='replace')}")
