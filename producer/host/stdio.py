"""Standard output and standard error, whatever is at their other end, and the log that is written to the latter.

Standard output may be a pipe that does not block, as some programs leave it to those that they start: Python's own
writer drops what such a pipe does not take at once. Here a write waits, but not past a stop signal. Standard error may
be a pipe that nobody reads, a full disk, or closed: no log line is worth a producer that stops capturing. A write to it
never fails and hardly waits; lines that are not taken are dropped and counted, and the log says how many.

Exceptions that nobody caught are logged. Python itself would write a traceback as it is, with the escape sequences and
line breaks that its message holds.
"""

import errno
import io
import logging
import select
import sys
import threading
import time
from types import TracebackType
from typing import Any

from producer.host import signals

logger = logging.getLogger(__name__)

_SLICE_S = 0.1
_STOP_WAIT_S = 1.0
"""How long output may wait after a stop was asked for."""
_ERRORS_WAIT_S = 1.0
_ERRORS_SHARE = 0.01
"""All that is written to standard error may wait for so long, and then for this share of the time."""


def take_over() -> None:
    """Put these streams in the place of sys.stdout and sys.stderr, but not of one that is closed."""
    sys.stdout = _over(_Output, sys.stdout)
    sys.stderr = _over(_Errors, sys.stderr)
    # A formatter that fails, or a dead pipe, stops no run.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda told: _log_uncaught(told.exc_type, told.exc_value, told.exc_traceback)
    sys.unraisablehook = lambda told: _log_uncaught(told.exc_type, told.exc_value, told.exc_traceback)


class LogHandler(logging.Handler):
    """Writes records to standard error, and counts those that it does not take."""

    def __init__(self) -> None:
        super().__init__()
        self._untold = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after a line about those that were dropped before it."""
        if self._untold and self._write(_dropped_record(self._untold)):
            self._untold = 0
        if self._untold or not self._write(record):
            self._untold += 1
            _count_dropped()

    def _write(self, record: logging.LogRecord) -> bool:
        stream = sys.stderr
        if stream is None:
            return False
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        drops = getattr(raw, "drops", 0)
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            return False
        return bool(getattr(raw, "drops", 0) == drops)


_dropped = 0


def dropped_lines() -> int:
    """Return how many records of the log standard error has not taken."""
    return _dropped


def _count_dropped() -> None:
    global _dropped  # handlers are called under their lock
    _dropped += 1


def _dropped_record(count: int) -> logging.LogRecord:
    text = "log: %d lines were dropped because standard error did not take them"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (count,), None)


class _Output(io.FileIO):
    """Waits until the descriptor takes something. After an error it drops all, since buffers still hold some."""

    _failed = False

    def write(self, data: Any) -> int:
        """Write some of the data; raise OSError once."""
        while not self._failed:
            try:
                self._wait()
                # A pipe that is ready has room for this much: the write does not block, as pipe(7) has it.
                written: int | None = super().write(data[: select.PIPE_BUF])
            except OSError:
                self._failed = True
                raise
            if written is not None:
                return written
        return len(data)

    def _wait(self) -> None:
        give_up_s = None
        while not _is_ready(self.fileno(), _SLICE_S):
            if signals.is_stopping():
                give_up_s = give_up_s or time.monotonic() + _STOP_WAIT_S
                if time.monotonic() >= give_up_s:
                    raise OSError(errno.EAGAIN, "nobody reads it")


class _Errors(io.FileIO):
    """Drops what is not taken soon, until the descriptor takes some again; a line that was cut is ended first."""

    drops = 0
    """How many writes were dropped."""
    _in_line = False
    """Whether what was written last ends in the middle of a line."""
    _is_cut = False
    _left_s = _ERRORS_WAIT_S
    _left_at_s = 0.0

    def write(self, data: Any) -> int:
        """Write some of the data, or drop it."""
        if self._is_cut and not self._try(b"\n"):
            self.drops += 1
            return len(data)
        self._is_cut = False
        if written := self._try(bytes(data[: select.PIPE_BUF])):
            return written
        self.drops += 1
        self._is_cut = self._in_line
        return len(data)

    def _try(self, data: bytes) -> int:
        """Write some of the data if the descriptor takes any; return how much."""
        if not self._wait():
            return 0
        try:
            written = super().write(data) or 0
        except OSError:
            return 0
        if written:
            self._in_line = data[written - 1] != 0x0A
        return written

    def _wait(self) -> bool:
        """Wait for a short time, of which there is less the more was used before."""
        begin_s = time.monotonic()
        self._left_s = min(_ERRORS_WAIT_S, self._left_s + (begin_s - self._left_at_s) * _ERRORS_SHARE)
        ready = _is_ready(self.fileno(), self._left_s)
        self._left_at_s = time.monotonic()
        self._left_s = max(0.0, self._left_s - (self._left_at_s - begin_s))
        return ready


def _over(kind: type[io.FileIO], old: Any) -> Any:
    """Return a stream on the descriptor of `old`, which keeps its encoding and shows what that has no code for."""
    try:
        raw = kind(old.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):  # closed, or a test's
        return old
    return io.TextIOWrapper(
        io.BufferedWriter(raw), old.encoding, errors="backslashreplace", newline="\n", line_buffering=True
    )


def _is_ready(descriptor: int, timeout_s: float) -> bool:
    """Say whether a write would do something, if only fail, waiting a little for it."""
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    return bool(ready.poll(timeout_s * 1000))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):  # of a thread: no error
        logger.error("uncaught %s", kind.__name__, exc_info=error and (kind, error, trace))
