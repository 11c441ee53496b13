"""Standard output and standard error, whatever they are connected to, and the log handler.

Standard output may be a non-blocking pipe, as some programs pass to their children: Python's own writer drops what such
a pipe does not take at once. Here a write waits, but not after a stop signal. Standard error may be a pipe or terminal
that nobody reads, a full disk, or closed. The log must never stop the capture: a write to it never fails and hardly
waits. Lines that cannot be written are dropped, counted and reported.

poll(2) reports a terminal as writable as soon as it takes a single byte, and a longer write would block there. So a
terminal is opened a second time, in non-blocking mode; the first file description is shared with the shell.

Uncaught exceptions are logged. Python itself would write the traceback with all escape sequences and line breaks of its
message.
"""

import contextlib
import errno
import io
import logging
import os
import select
import sys
import threading
import time
from types import TracebackType
from typing import Any

from producer.host import progress, signals

logger = logging.getLogger(__name__)

_SLICE_S = 0.1
_PAUSE_S = 0.01
"""Between two tries: a terminal that is writable may not take a character that becomes two."""
_STOP_WAIT_S = 1.0
"""Maximum wait of output after a stop signal."""
_ERRORS_WAIT_S = 1.0
_ERRORS_SHARE = 0.01
"""Writes to standard error may wait for this long in total, and then for this share of the time."""


def take_over() -> None:
    """Replace sys.stdout and sys.stderr, unless they are closed."""
    sys.stdout = _over(Output, sys.stdout)
    sys.stderr = _over(_Errors, sys.stderr)
    # Failures of formatters and pipes must not end the run.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


class LogHandler(logging.Handler):
    """Writes records to standard error, and counts those that cannot be written."""

    def __init__(self) -> None:
        super().__init__()
        self._unreported = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after a report of records dropped before it."""
        progress.clear()
        if self._unreported and self._write(_dropped_record(self._unreported)):
            self._unreported = 0
        if self._unreported or not self._write(record):
            self._unreported += 1
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
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False
        return bool(getattr(raw, "drops", 0) == drops)


_dropped = 0


def dropped_lines() -> int:
    """Return the number of log records dropped so far."""
    return _dropped


def _count_dropped() -> None:
    global _dropped  # handlers hold their lock
    _dropped += 1


def _dropped_record(count: int) -> logging.LogRecord:
    text = "log: %d lines dropped: standard error was full or closed"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (count,), None)


class Output(io.FileIO):
    """Waits until the descriptor is writable. After an error it discards all output, since buffers may hold more."""

    _failed = False

    def write(self, data: Any) -> int:
        """Write some of the data. Raises OSError once."""
        deadline_s = None
        while not self._failed:
            try:
                # A writable pipe takes this much without blocking; see pipe(7).
                if _is_ready(self.fileno(), _SLICE_S) and (written := super().write(data[: select.PIPE_BUF])):
                    return written
                if signals.is_stopping():
                    deadline_s = deadline_s or time.monotonic() + _STOP_WAIT_S
                    if time.monotonic() >= deadline_s:
                        raise OSError(errno.EAGAIN, "the reader does not read")
            except OSError:
                self._failed = True
                raise
            time.sleep(_PAUSE_S)
        return len(data)


class _Errors(io.FileIO):
    """Drops output while the descriptor is blocked; afterwards ends a truncated line first."""

    drops = 0
    """Number of dropped writes."""
    _in_line = False
    """Whether the last write ended in the middle of a line."""
    _is_cut = False
    _budget_s = _ERRORS_WAIT_S
    _budget_at_s = 0.0

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
        """Write as much as the descriptor takes; return the number of bytes."""
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
        """Wait for the descriptor, within the remaining budget of waiting time."""
        begin_s = time.monotonic()
        self._budget_s = min(_ERRORS_WAIT_S, self._budget_s + (begin_s - self._budget_at_s) * _ERRORS_SHARE)
        ready = _is_ready(self.fileno(), self._budget_s)
        self._budget_at_s = time.monotonic()
        self._budget_s = max(0.0, self._budget_s - (self._budget_at_s - begin_s))
        return ready


def _over(kind: type[io.FileIO], old: Any) -> Any:
    """Return a stream on the descriptor of `old`, with its encoding, that escapes what it cannot encode."""
    try:
        raw = kind(_own(old.fileno()), "w", closefd=False)
    except (AttributeError, OSError, ValueError):  # closed, or replaced by a test
        return old
    return io.TextIOWrapper(
        io.BufferedWriter(raw), old.encoding, errors="backslashreplace", newline="\n", line_buffering=True
    )


def _own(descriptor: int) -> int:
    """Return another descriptor of a terminal, on which writes do not block; the same one if there is none."""
    if os.isatty(descriptor):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # another user's terminal, as after su
            return os.open(f"/proc/self/fd/{descriptor}", flags)
    return descriptor


def _is_ready(descriptor: int, timeout_s: float) -> bool:
    """Wait until a write would succeed or fail at once; return whether it would."""
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    return bool(ready.poll(timeout_s * 1000))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):  # not an error in a thread
        logger.error("uncaught %s", kind.__name__, exc_info=error and (kind, error, trace))
