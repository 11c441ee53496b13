"""One line of progress on standard error, for people: nothing is written if that is not a terminal.

A terminal without control sequences gets one line at the beginning, which stays.
"""

import os
import sys
import time
from typing import Self

from producer.host.text import printable

_EVERY_S = 0.2
_CLEAR = "\r\x1b[K"
_LINE = f"{_CLEAR}\x1b[?7l{{}}\x1b[?7h"
"""Without wrapping: of a line that wraps, only the end could be cleared."""
_shown: "Progress | None" = None
"""The one whose line is on the terminal."""


class Progress:
    """Shows `what` while the context lasts, and how much is done when it is called. The line vanishes at the end."""

    def __init__(self, what: str) -> None:
        self._what = printable(what)
        self._stream = sys.stderr
        self._visible = self._stream is not None and self._stream.isatty()
        self._is_dumb = os.environ.get("TERM") == "dumb"
        self._next_s = 0.0

    def __enter__(self) -> Self:
        self._write(f"{self._what} ...\n" if self._is_dumb else _LINE.format(f"{self._what} ..."))
        self._visible = self._visible and not self._is_dumb
        return self

    def __exit__(self, *_: object) -> None:
        self._write(_CLEAR)

    def __call__(self, done: int, total: int = 0) -> None:
        """Show how much is done, of `total` if that is known; at most five times a second."""
        if self._visible and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            share = f"{min(done, total) / total:.0%} of {total:,}" if total else f"{done:,}"
            self._write(_LINE.format(f"{self._what}: {share}"))

    def _write(self, text: str) -> None:
        global _shown
        if not self._visible or self._stream is None:
            return
        _shown = None if text == _CLEAR else self
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal has closed; ValueError: so was the stream
            self._visible = False


def clear() -> None:
    """Clear the line, before something else is written; the next call of the progress shows it again."""
    if _shown is not None:
        _shown._write(_CLEAR)
