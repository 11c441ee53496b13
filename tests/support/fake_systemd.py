"""A fake systemd: sd_notify, the file descriptor store, and the start of a service with the stored descriptors."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

# Becomes the service: stored descriptors start at 3, and LISTEN_PID is its pid.
_START = """
import fcntl, os, sys
_, given, names, *command = sys.argv
given = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 500) for each in given.split(",") if each]
for number, descriptor in enumerate(given, 3):
    os.dup2(descriptor, number)
os.closerange(3 + len(given), 1000)
if given:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)), LISTEN_FDNAMES=names)
os.execvp(command[0], command)
"""


class Manager:
    """A service manager for one service: records each message and stores descriptors by name."""

    def __init__(self, folder: Path, limit: int = 128) -> None:
        self.address = str(folder / "notify")
        self.messages: list[str] = []
        self._stored: dict[str, int] = {}
        self._has_read = threading.Event()
        self._limit = limit
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._thread = threading.Thread(target=self._serve)

    @property
    def stored(self) -> dict[str, int]:
        """The stored descriptors by name, once all messages that were sent have been read."""
        self._has_read.clear()
        self._send(b"READ")
        self._has_read.wait()
        return self._stored

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the service."""
        return {"NOTIFY_SOCKET": self.address, "FDSTORE": str(self._limit)}

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, **settings: Any
    ) -> "subprocess.Popen[str]":
        """Start a process of the service with all stored descriptors."""
        stored = self.stored
        given = list(stored.values())
        start = [sys.executable, "-c", _START, ",".join(map(str, given)), ":".join(stored), *command]
        env = {**os.environ, **self.environment, **(environment or {})}
        return subprocess.Popen(start, env=env, pass_fds=given, text=True, **settings)

    def forget(self, *names: str) -> None:
        """Close stored descriptors, as a stop does: all, unless names are given."""
        for name in names or tuple(self._stored):
            os.close(self._stored.pop(name))

    def __enter__(self) -> Self:
        self._socket.bind(self.address)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._send(b"END")
        self._thread.join()
        self._socket.close()
        self.forget()

    def _send(self, packet: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(packet, self.address)

    def _serve(self) -> None:
        while True:
            packet, descriptors, *_ = socket.recv_fds(self._socket, 4096, 16)
            if packet == b"END":
                return
            if packet == b"READ":
                self._has_read.set()
                continue
            self._take(packet.decode(), descriptors)

    def _take(self, text: str, descriptors: list[int]) -> None:
        self.messages.append(text)
        lines = dict(line.split("=", 1) for line in text.splitlines())
        if lines.get("FDSTORE") == "1" and len(self._stored) < self._limit:
            (descriptor,) = descriptors
            assert lines["FDNAME"] not in self._stored, "systemd would keep both"
            self._stored[lines["FDNAME"]] = descriptor
            return
        if lines.get("FDSTOREREMOVE") == "1":
            os.close(self._stored.pop(lines["FDNAME"]))
        for descriptor in descriptors:
            os.close(descriptor)
