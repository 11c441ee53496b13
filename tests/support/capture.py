"""Shared by the kernel tests: a recording of all captured rows, and sockets in other namespaces."""

import contextlib
import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from producer.demo.lab import Host
from producer.events import FLOWS, HOOKS, STREAMS, Rows, Stream
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from tests.support.rebpf import COMPILED, PROGRAMS

T = TypeVar("T")

ALLOWED = tuple(os.environ.get("REBPF_TEST_HOOKS", ",".join(HOOKS)).split(","))
"""The hooks under test. The tests are the same for all."""
DEADLINE_S = 120
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def hook_settings(**others: Any) -> CaptureSettings:
    """Return settings with the hooks under test, and with compiled programs if there are some."""
    paths = {"cache": os.environ.get(COMPILED), "programs": os.environ.get(PROGRAMS)}
    found = {name: Path(path) for name, path in paths.items() if path}
    return CaptureSettings(**{"hooks": ALLOWED, **found, **others})


def wait_for(condition: Callable[[], T | None], what: str) -> T:
    """Wait until `condition` returns neither None nor False, and return its result."""
    deadline = time.monotonic() + DEADLINE_S
    while (result := condition()) is None or result is False:
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.02)
    return result


class Recording:
    """Attached probes, and all rows of their rings since then."""

    def __init__(self, settings: CaptureSettings) -> None:
        self.kernel = Capture(settings)
        self._streams = settings.streams
        self._all: dict[str, Rows] = {}

    def __enter__(self) -> "Recording":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.kernel)
            self.kernel.load()
            self._rings = {stream.name: stack.enter_context(self.kernel.ring(stream)) for stream in self._streams}
            self._all = {stream.name: np.empty(0, stream.dtype) for stream in self._streams}
            self.kernel.attach()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def all(self, stream: Stream) -> Rows:
        """Drain the ring and return all rows so far."""
        ring = self._rings[stream.name]
        while len(rows := ring.read(1 << 16)):
            self._all[stream.name] = np.concatenate([self._all[stream.name], rows])
            ring.commit(ring.position)
        return self._all[stream.name]

    def of_port(self, stream: Stream, port: int) -> Rows:
        """Return the rows that have `port` on either side."""
        rows = self.all(stream)
        flow = rows["flow"] if stream == FLOWS else rows["s"]["flow"]
        chosen: Rows = rows[(flow["sport"] == port) | (flow["dport"] == port)]
        return chosen

    def wait_rows(self, stream: Stream, port: int, count: int) -> Rows:
        """Wait for at least `count` rows of a port, and return them."""

        def condition() -> Rows | None:
            rows = self.of_port(stream, port)
            return rows if len(rows) >= count else None

        return wait_for(condition, f"{count} events of the {stream.name} stream")


class Skips:
    """Counts the program runs that the kernel has skipped since this was created. See docs/truth.md."""

    def __init__(self, capture: Recording) -> None:
        self._capture = capture
        self._first = {stream.name: len(capture.all(stream)) for stream in STREAMS}
        self._nested = {stream.name: capture.kernel.counters(stream).nested for stream in STREAMS}

    def of(self, stream: Stream) -> int:
        """Return the number of events of the stream that may be missing."""
        counters = self._capture.kernel.counters(stream)
        assert counters.ring_full == 0
        if self._capture.kernel.hooks_in_use["transmit"] == "kprobe" and kernel_version() < (6, 7):
            # These kernels do not count skipped runs. Both streams' retransmissions are sent in softirqs, where the
            # kernel skips runs.
            return 4 + len(self._capture.all(stream)[self._first[stream.name] :]) // 50
        return counters.nested - self._nested[stream.name]


def kernel_version() -> tuple[int, int]:
    """Return the running kernel's version, without its patch level."""
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int(minor)


def sees_ipv6_synacks(capture: Recording) -> bool:
    """Whether SYN-ACKs over IPv6 are captured: older kernels do not run the cgroup hook for them."""
    return capture.kernel.hooks_in_use["transmit"] != "cgroup_skb" or kernel_version() >= (6, 12)


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """Move this thread into the network namespace of `host`. Sockets that it creates stay there."""
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{host.pid}/ns/net") as target:
        _enter(target.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Pair:
    """A connection from `client` to `server`, both ends in this process."""

    def __init__(self, client: Host, server: Host, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        mapped = address.startswith("::ffff:")
        with inside(server):
            bound = ("::" if mapped else address, port)
            self._listener = socket.create_server(bound, family=family, dualstack_ipv6=mapped)
        with inside(client):
            self.client = socket.create_connection((address, port), timeout=DEADLINE_S)
        self.accepted, _ = self._listener.accept()
        for end in (self.client, self.accepted):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(DEADLINE_S)

    def exchange(self, count: int, size: int) -> None:
        """Send `count` segments of `size` bytes, each after the other side's one-byte answer."""
        for _ in range(count):
            self.client.sendall(bytes(size))
            assert len(self.accepted.recv(size, socket.MSG_WAITALL)) == size
            self.accepted.sendall(b"!")
            assert self.client.recv(1) == b"!"

    def transfer(self, size: int) -> None:
        """Send bytes from client to server in one stream, at the receiver's pace."""
        self.client.setblocking(False)
        sent = received = 0
        while received < size:
            if sent < size:
                with contextlib.suppress(BlockingIOError):
                    sent += self.client.send(bytes(min(size - sent, 1 << 18)))
            received += len(self.accepted.recv(1 << 18))
        self.client.settimeout(DEADLINE_S)

    def end(self) -> None:
        """Close in an order in which the last acknowledgement comes from a full socket, not from one in time wait."""
        self.client.shutdown(socket.SHUT_WR)
        assert self.accepted.recv(1) == b""
        self.accepted.close()
        assert self.client.recv(1) == b""

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exception: object) -> None:
        for each in (self.client, self.accepted, self._listener):
            each.close()


def cookie_of(end: socket.socket) -> int:
    """Return SO_COOKIE."""
    return int.from_bytes(end.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


def disconnect(end: socket.socket) -> None:
    """Dissolve a connection, by connect(2) with AF_UNSPEC."""
    assert _libc.connect(end.fileno(), bytes(16), 16) == 0


@contextlib.contextmanager
def rules(host: Host, hook: str, rule: str) -> Iterator[None]:
    """Install an nftables rule at `hook` (prerouting, output) of a host."""
    chain = f"chain c {{ type filter hook {hook} priority -300; {rule}; }};"
    _nft(host, f"table inet test_{hook} {{ {chain} }}")
    try:
        yield
    finally:
        _nft(host, f"delete table inet test_{hook}")


def _nft(host: Host, text: str) -> None:
    subprocess.run(host.command("nft", "-f", "-"), input=text, text=True, check=True)


@contextlib.contextmanager
def setting(host: Host, name: str, value: object) -> Iterator[None]:
    """Set a sysctl of a host while the context lasts."""
    before = subprocess.check_output(host.command("sysctl", "-n", name), text=True).strip()
    subprocess.run(host.command("sysctl", "-qw", f"{name}={value}"), check=True)
    try:
        yield
    finally:
        subprocess.run(host.command("sysctl", "-qw", f"{name}={before}"), check=True)


def kernel_btf_with(folder: Path, renamed: dict[str, str]) -> Path:
    """Write the running kernel's BTF with renamed members (same length), as if they did not exist."""
    blob = Path("/sys/kernel/btf/vmlinux").read_bytes()
    for name, other in renamed.items():
        assert len(name) == len(other)
        assert blob.count(b"\0" + name.encode() + b"\0") == 1
        blob = blob.replace(b"\0" + name.encode() + b"\0", b"\0" + other.encode() + b"\0")
    path = folder / "btf"
    path.write_bytes(blob)
    return path


def receive(end: socket.socket, size: int) -> None:
    """Read exactly the given number of bytes."""
    while size:
        data = end.recv(size)
        assert data
        size -= len(data)
