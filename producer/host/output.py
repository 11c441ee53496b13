"""Formats and writes the log and standard output.

Names, paths and messages in them come from outside. Whatever they contain, a record is one line without escape
sequences. Output that cannot be written is an OutputError.
"""

import contextlib
import logging
import os
import re
import select
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TextIO

from producer.errors import OutputError, ReaderGoneError
from producer.host.text import lines, printable, to_json

MAX_RECORD_BYTES = 8192
"""Maximum size of a log record, including its traceback."""

_CUT = "...[cut]"
_INDENT = "    "
_SEVERITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")


def set_log_level(level: str) -> None:
    """Set the lowest level to log: debug, info, warning or error. Libraries keep theirs."""
    logging.getLogger("producer").setLevel(level.upper())


class LineFormatter(logging.Formatter):
    """Formats a record as one printable, bounded line; the lines of a traceback follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, followed by as many of the last lines of its traceback as fit."""
        head, prefix = self._head(record), self._prefix(record)
        details = self._details(record)
        if not details:
            return bounded(head + printable(_message(record)))
        first = bounded(head + printable(_message(record)), MAX_RECORD_BYTES // 2)
        return "\n".join([first, *_indented(details, MAX_RECORD_BYTES - len(first.encode()), prefix)])

    def _head(self, record: logging.LogRecord) -> str:
        return f"{self.formatTime(record)} {record.levelname} "

    def _prefix(self, record: logging.LogRecord) -> str:
        return ""

    def _details(self, record: logging.LogRecord) -> str:
        """Return the traceback and the stack, if the record has any."""
        trace = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        return "\n".join(each for each in (trace, record.stack_info) if each)


class JournalFormatter(LineFormatter):
    """Begins each line with its priority, <N> (sd-daemon(3)); the journal adds the time."""

    def _head(self, record: logging.LogRecord) -> str:
        return f"{self._prefix(record)}{record.levelname} "

    def _prefix(self, record: logging.LogRecord) -> str:
        return f"<{_severity(record.levelno)}>"


class JsonFormatter(LineFormatter):
    """Formats a record as one JSON object per line: time, level, logger, message and, after an exception, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, of at most MAX_RECORD_BYTES."""
        limit = MAX_RECORD_BYTES // 2
        while len(text := to_json(self._fields(record, limit))) > MAX_RECORD_BYTES:
            limit //= 2
        return text

    def _fields(self, record: logging.LogRecord, limit: int) -> dict[str, str]:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        fields["message"] = bounded(printable(_message(record)), limit)
        if details := self._details(record):
            fields["traceback"] = "\n".join(_indented(details, limit))
        return fields


def formatter(log_format: str) -> logging.Formatter:
    """Return the formatter of a --log-format; `auto` is journald if standard error is the journal, otherwise text."""
    if log_format == "auto":
        log_format = "journald" if _is_journal() else "text"
    return {"text": LineFormatter, "journald": JournalFormatter, "json": JsonFormatter}[log_format]()


def _is_journal() -> bool:
    """Whether JOURNAL_STREAM names the device and inode of standard error; see systemd.exec(5)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _severity(level: int) -> int:
    """Return the severity of RFC 5424: 2 critical, 3 error, 4 warning, 6 informational, 7 debug."""
    return next((severity for least, severity in _SEVERITIES if level >= least), 7)


def bounded(text: str, limit: int = MAX_RECORD_BYTES) -> str:
    """Return at most `limit` bytes of printable text; a mark at its end shows that it was cut."""
    if len(text) * 4 <= limit:
        return text
    raw = text.encode()
    if len(raw) <= limit:
        return text
    return raw[: limit - len(_CUT)].decode(errors="ignore") + _CUT


def echo(text: str, *, err: bool = False, color: bool = False) -> None:
    """Write lines to standard output, or to standard error, and flush.

    Unprintable characters are escaped; with `color`, except styles: the foreign parts must be escaped already.
    Raises ReaderGoneError if the reader of a pipe has exited, OutputError if the stream cannot be written.
    """
    stream, name = (sys.stderr, "standard error") if err else (sys.stdout, "standard output")
    if stream is None:
        raise OutputError(f"{name} is closed: redirect it to /dev/null if it is not needed")
    clean = "\n".join(map(_styled, text.split("\n"))) if color else lines(text.split("\n"))
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(clean.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError as error:
        _discard(stream)
        raise ReaderGoneError(f"{name}: the reader has exited") from error
    except (OSError, ValueError) as error:  # ValueError: the stream was closed
        _discard(stream)
        raise OutputError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def require_reader() -> None:
    """Raise ReaderGoneError if standard output has lost its reader, for commands that may not write for a while."""
    poll = select.poll()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or replaced by a test
        poll.register(sys.stdout.fileno(), 0)
    if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        raise ReaderGoneError("standard output: the reader has exited")


def hold_descriptors() -> None:
    """Open /dev/null in place of closed standard streams, so that no other file gets their descriptors."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() returns the lowest free descriptor, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Discard output that cannot be written at the end, since Python would otherwise exit with status 120."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                _discard(stream)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit must not cost the line
        return f"{record.msg} {record.args!r}"


def _indented(text: str, capacity: int, prefix: str = "") -> list[str]:
    """Return as many of the last lines as fit into `capacity` bytes with their line breaks: the error is at the end."""
    kept: list[str] = []
    indent = prefix + _INDENT
    capacity -= len(indent) + len(_CUT) + 1
    for line in reversed(text.rstrip("\n").split("\n")):
        shown = bounded(indent + printable(line), MAX_RECORD_BYTES // 8)
        capacity -= len(shown.encode()) + 1
        if capacity < 0:
            kept.append(indent + _CUT)
            break
        kept.append(shown)
    return kept[::-1]


def _styled(line: str) -> str:
    return "".join(part if number % 2 else printable(part) for number, part in enumerate(_STYLE.split(line)))


def _discard(stream: TextIO) -> None:
    """Discard the buffer and all further output."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
