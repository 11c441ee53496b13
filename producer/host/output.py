"""All that the command writes for people and scripts: lines of the log, and standard output.

Names, paths and messages in them come from others. Whatever they hold, a record is one line, no escape sequence gets
through, and output that cannot be written ends with its own error.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from producer.errors import OutputError, ReaderGoneError
from producer.host.text import lines, printable

MAX_RECORD_BYTES = 8192
"""Most bytes of a record of the log, its traceback included."""

_CUT = "...[cut]"
_INDENT = "    "
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")


class LineFormatter(logging.Formatter):
    """Makes one printable, bounded line of each record; the lines of a traceback follow, indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s ")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, and the last lines of its traceback as far as there is room."""
        head = self.formatTime(record) + f" {record.levelname} "
        trace = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        details = [each for each in (trace, record.stack_info) if each]
        if not details:
            return bounded(head + printable(_message(record)))
        first = bounded(head + printable(_message(record)), MAX_RECORD_BYTES // 2)
        return "\n".join([first, *_indented("\n".join(details), MAX_RECORD_BYTES - len(first.encode()))])


def bounded(text: str, limit: int = MAX_RECORD_BYTES) -> str:
    """Return printable text of at most `limit` bytes; a mark at its end says that it was cut."""
    if len(text) * 4 <= limit:
        return text
    raw = text.encode()
    if len(raw) <= limit:
        return text
    return raw[: limit - len(_CUT)].decode(errors="ignore") + _CUT


def echo(text: str, *, err: bool = False, color: bool = False) -> None:
    """Write lines to standard output, or to standard error, at once.

    Each line is cleaned; with `color`, colours and weights stay: for text whose foreign parts are cleaned already.
    Raises ReaderGoneError where the reader of a pipe has gone, OutputError where nothing can be written.
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
        raise ReaderGoneError(f"{name}: the reader has gone") from error
    except (OSError, ValueError) as error:  # ValueError: the stream was closed
        _discard(stream)
        raise OutputError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def hold_descriptors() -> None:
    """Open /dev/null in place of standard streams that are closed, lest a file of the state folder become one."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Drop at the end what a standard stream cannot write: at its exit Python would fail over it, with status 120."""
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
    except Exception:  # a line with arguments that do not fit is worth more than none
        return f"{record.msg} {record.args!r}"


def _indented(text: str, room: int) -> list[str]:
    """Return the last of the lines that fit into `room` bytes with their line breaks: the error is at the end."""
    kept: list[str] = []
    room -= len(_INDENT) + len(_CUT) + 1
    for line in reversed(text.rstrip("\n").split("\n")):
        shown = bounded(_INDENT + printable(line), MAX_RECORD_BYTES // 8)
        room -= len(shown.encode()) + 1
        if room < 0:
            kept.append(_INDENT + _CUT)
            break
        kept.append(shown)
    return kept[::-1]


def _styled(line: str) -> str:
    return "".join(part if number % 2 else printable(part) for number, part in enumerate(_STYLE.split(line)))


def _discard(stream: TextIO) -> None:
    """Send what the buffer still holds, and all that follows, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
