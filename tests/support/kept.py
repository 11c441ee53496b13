"""Another version of the producer, and traffic while one takes over hooks from the other."""

import socket
import subprocess
import threading
from pathlib import Path

from producer import paths
from tests.support.capture import wait_for
from tests.support.servers.process import free_port

OTHER_VERSION = """
import json, sys
from pathlib import Path
import numpy as np
from producer.events import TRANSMITS
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from producer.kernel.pinned import PinFolder
from producer.rules.tables import only, tables
from producer.kernel.sequence import EventNumbers

pins, state, port, cpus, allowed = json.loads(sys.argv[1])
settings = CaptureSettings(hooks=tuple(allowed), rules=tables(*only((), (port,))))
with PinFolder(Path(pins)) as folder, Capture(settings, folder, EventNumbers(Path(state), "a boot", cpus)) as capture:
    capture.load()
    capture.attach()
    with capture.ring(TRANSMITS) as ring:
        print(capture.ring_id, flush=True)
        sys.stdin.readline()
        rows = ring.read(1 << 16)
        assert rows.dtype["note"] == "<u8"
        np.save(Path(state) / "committed.npy", rows)
        ring.commit(ring.position)
        print("committed", flush=True)
        sys.stdin.readline()
"""
"""Attaches the hooks, and commits what it has read when told."""


class Traffic:
    """A loopback connection on which a thread sends single bytes, each after an answer."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self._sockets = [self._listener]
        self.port: int = self._listener.getsockname()[1]
        self.sent = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def start(self) -> None:
        self._client = socket.create_connection(("127.0.0.1", self.port))
        self._sockets.append(self._client)
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._accepted, _ = self._listener.accept()
        self._sockets.append(self._accepted)
        self._thread.start()

    def _send(self) -> None:
        while not self._done.wait(0.0001):
            self._client.sendall(b"?")
            self.sent += 1
            self._accepted.sendall(self._accepted.recv(1))
            self._client.recv(1)

    def wait_more(self, count: int) -> None:
        aim = self.sent + count
        wait_for(lambda: self.sent >= aim, "traffic")

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def __enter__(self) -> "Traffic":
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        for each in self._sockets:
            each.close()


def other_version(folder: Path) -> Path:
    """Copy the package with another layout of the transmit events, as if it were another version."""
    package = paths.BPF.parent
    for name in ("producer", "bpf", "schemas"):
        subprocess.run(["cp", "-r", str(package / name), str(folder)], check=True)
    header = folder / "bpf" / "events.h"
    before = "\tu32 is_retransmit;\n\tu32 _pad3;\n"
    assert header.read_text().count(before) == 1
    header.write_text(header.read_text().replace(before, f"{before}\tu64 note;\n"))
    events = folder / "producer" / "events.py"
    before = '("is_retransmit", "<u4"), ("_pad3", "<u4")'
    assert events.read_text().count(before) == 1
    events.write_text(events.read_text().replace(before, f'{before}, ("note", "<u8")'))
    return folder
