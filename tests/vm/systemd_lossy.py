"""Two hosts, and a router that drops packets on the way to the second: network namespaces and netem.

The router drops packets that have left the sender, so the sender's kernel counts them as sent.
"""

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SENDER, ROUTER, RECEIVER = "sender", "router", "receiver"
PORT = 7007
_ADDRESSES = {SENDER: "10.77.1.2", RECEIVER: "10.77.2.2"}
_LOSS = "5%"
_TRANSFER_BYTES = 300_007
_DEADLINE_S = 120
_CLONE_NEWNET = 0x40000000
_SILENT_STATES = {"06", "0A"}  # of /proc/net/tcp: TIME_WAIT, LISTEN
_libc = ctypes.CDLL(None, use_errno=True)


def build() -> dict[str, int]:
    """Create the hosts and return the inode numbers of their namespaces."""
    for name in (SENDER, ROUTER, RECEIVER):
        _run("ip", "netns", "add", name)
    for number, name in enumerate(_ADDRESSES, 1):
        subnet = f"10.77.{number}"
        _run("ip", "-n", name, "link", "add", "up0", "type", "veth", "peer", "name", f"to_{name}", "netns", ROUTER)
        _run("ip", "-n", name, "address", "add", f"{subnet}.2/24", "dev", "up0")
        _run("ip", "-n", ROUTER, "address", "add", f"{subnet}.1/24", "dev", f"to_{name}")
        _run("ip", "-n", name, "link", "set", "up0", "up")
        _run("ip", "-n", ROUTER, "link", "set", f"to_{name}", "up")
        _run("ip", "-n", name, "route", "add", "default", "via", f"{subnet}.1")
    _run("ip", "netns", "exec", ROUTER, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
    _run("tc", "-n", ROUTER, "qdisc", "add", "dev", f"to_{RECEIVER}", "root", "netem", "loss", _LOSS)
    return {name: os.stat(f"/run/netns/{name}").st_ino for name in _ADDRESSES}


def send_until(retransmitted: int) -> None:
    """Send transfers, one by one, until the sender's kernel has counted the given number of retransmitted segments."""
    with _inside(RECEIVER):
        listener = socket.create_server((_ADDRESSES[RECEIVER], PORT))
    end = time.monotonic() + _DEADLINE_S
    with listener:
        while retransmits(SENDER) < retransmitted:
            if time.monotonic() > end:
                raise TimeoutError(f"{retransmits(SENDER)} retransmits, expected {retransmitted}")
            _transfer(listener)
    while any(_open_connections(name) for name in _ADDRESSES):
        if time.monotonic() > end:
            raise TimeoutError("connections do not end")
        time.sleep(0.1)


def retransmits(name: str) -> int:
    """Return a host's RetransSegs since its namespace was created, by nstat."""
    lines = _run("ip", "netns", "exec", name, "nstat", "-asz", "TcpRetransSegs").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("TcpRetransSegs")))


def _transfer(listener: socket.socket) -> None:
    with _inside(SENDER):
        client = socket.socket()
    accepted: list[socket.socket] = []
    accepting = threading.Thread(target=lambda: accepted.append(listener.accept()[0]))
    accepting.start()
    with client:
        client.connect((_ADDRESSES[RECEIVER], PORT))
        accepting.join()
        with accepted[0] as server:
            sending = threading.Thread(target=lambda: (client.sendall(bytes(_TRANSFER_BYTES)), client.shutdown(1)))
            sending.start()
            received = 0
            while data := server.recv(1 << 16):
                received += len(data)
            sending.join()
        if received != _TRANSFER_BYTES:
            raise AssertionError(f"{received} bytes arrived of {_TRANSFER_BYTES}")
        client.recv(1)


@contextmanager
def _inside(name: str) -> Iterator[None]:
    """Move this thread into a host's namespace. Sockets stay where they were created."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{name}") as there:
        _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(home.fileno())


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _open_connections(name: str) -> int:
    with _inside(name):
        rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[3] not in _SILENT_STATES for row in rows)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
