"""A command in a terminal of its own: its screen, its keys and its end."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.support.rebpf import DEADLINE_S

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class PtyCommand:
    """Runs a command in a terminal of this size, and reads what it writes."""

    def __init__(self, command: list[str], columns: int, lines: int, **env: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        self.output = ""
        terminal = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **env}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, env=terminal
        )
        os.close(slave)

    def screen(self) -> list[str]:
        """Return the last whole screen, without colors; empty if there is none yet."""
        return [_CONTROL.sub("", line).rstrip() for line in self.colored()]

    def colored(self) -> list[str]:
        """Return the last whole screen."""
        self.read(0.1)
        frames = [frame for frame in self.output.split("\x1b[H")[1:] if "\x1b[?25l" in frame]
        if not frames:
            return []
        return [line.removeprefix("\x1b[K").rstrip("\r") for line in frames[-1].partition("\x1b[?25l")[0].split("\r\n")]

    def wait_for(self, condition: Callable[[list[str]], object], what: str) -> list[str]:
        """Return the first screen that fulfils the condition."""
        deadline = time.monotonic() + DEADLINE_S
        while not ((screen := self.screen()) and condition(screen)):
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.output[-2000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n" + "\n".join(screen)
        return screen

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def echoes(self) -> bool:
        """Return whether the terminal is in the state in which shells use it: it shows what is typed."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read(self, timeout_s: float) -> None:
        """Take what it has written."""
        while select.select([self._master], [], [], timeout_s)[0]:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # its end is closed
                return
            if not data:
                return
            self.output += data.decode(errors="replace")
            timeout_s = 0

    def close(self) -> None:
        """Close the terminal, as a window is closed."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def wait(self) -> int:
        """Wait for the end, and return its status."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            if self._master >= 0:
                self.read(0.1)
            else:
                time.sleep(0.05)
        if self._master >= 0:
            self.read(0.1)
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
