"""The terminal of a full-screen view: the screen is drawn whole, and keys are read one by one."""

import contextlib
import locale
import os
import re
import select
import signal
import sys
import termios
import tty
from typing import Self

from producer.errors import OutputError
from producer.host import signals
from producer.view.screen import Display

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _HIDE_CURSOR = "\x1b[H", "\x1b[K", "\x1b[?25l"
_READ_BYTES = 1024
_USUAL = 80, 24
"""Columns and lines of a terminal that does not report its size, such as a serial console."""
_ESCAPES = {
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1b[H": "home", "\x1bOH": "home", "\x1b[1~": "home",
}  # fmt: skip
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]?")
_NAMES = {
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace", "\x1b": "escape", "\x15": "clear",
    "\x1a": "suspend",
}  # fmt: skip
_CC = 6
"""The place of the special characters in termios settings."""
_DISABLED = b"\0"


def is_usable() -> bool:
    """Return whether standard input and output are a terminal that can place the cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Terminal:
    """Standard input and output as a screen, restored at exit. Raises OutputError when it has gone."""

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._input, self._output = sys.stdin.fileno(), sys.stdout.fileno()

    def __enter__(self) -> Self:
        self._settings = termios.tcgetattr(self._input)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OutputError, termios.error):  # it has gone
            self._give_back()

    def _suspend(self) -> None:
        """Stop this job, as Ctrl-Z does, and redraw when the shell continues it."""
        self._give_back()
        os.kill(0, signal.SIGTSTP)
        self._take()

    def _take(self) -> None:
        tty.setcbreak(self._input)
        settings = termios.tcgetattr(self._input)
        settings[_CC][termios.VSUSP] = _DISABLED  # Ctrl-Z is a key, since the screen must be left before
        termios.tcsetattr(self._input, termios.TCSADRAIN, settings)
        self._write(_ENTER)

    def _give_back(self) -> None:
        termios.tcsetattr(self._input, termios.TCSANOW, self._settings)
        self._write(_LEAVE)

    def display(self) -> Display:
        """Return what the screen can show now."""
        size = os.get_terminal_size(self._output)
        # Not the stream's encoding, which Python takes to be UTF-8 with LC_ALL=C, too.
        unicode = locale.nl_langinfo(locale.CODESET).upper() == "UTF-8"
        return Display(size.columns or _USUAL[0], size.lines or _USUAL[1], self._color, unicode)

    def draw(self, lines: list[str]) -> None:
        """Show as many lines as the screen has; foreign text in them must be printable."""
        # Cleared before, since the cursor stays on the last character of a full line, which it would take.
        self._write(_HOME + "\r\n".join(f"{_CLEAR_LINE}{line}" for line in lines) + _HIDE_CURSOR)

    def keys(self, timeout_s: float) -> list[str]:
        """Wait for keys, a signal or the end of the time, and return the keys. `eof` is a closed input.

        Ctrl-Z stops the process here, and is returned when it continues.
        """
        ready, _, _ = select.select([self._input, signals.descriptor()], [], [], timeout_s)
        if self._input not in ready:
            return []
        try:
            text = os.read(self._input, _READ_BYTES).decode(errors="ignore")
        except OSError:
            return ["eof"]
        found = _parsed(text) if text else ["eof"]
        if "suspend" in found:
            self._suspend()
        return found

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)  # which waits for a slow terminal, but not after a stop signal
            sys.stdout.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            raise OutputError(f"the terminal: {getattr(error, 'strerror', None) or error}") from error


def _parsed(text: str) -> list[str]:
    """Return the names of keys."""
    found = []
    while text:
        sequence = next((each for each in _ESCAPES if text.startswith(each)), None)
        if sequence:
            found.append(_ESCAPES[sequence])
        elif match := _CONTROL.match(text):  # of another key
            sequence = match[0]
        else:
            sequence = text[0]
            found.append(_NAMES.get(sequence, sequence))
        text = text[len(sequence) :]
    return found
