"""Known TCP traffic on loopback."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple, Self

from tests.support.rebpf import DEADLINE_S
from tests.support.servers.process import free_port


def has_ipv6() -> bool:
    """Whether this host's loopback has IPv6, which containers often lack."""
    try:
        _server("::1", 0).close()
    except OSError:
        return False
    return True


def _server(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=1024)


LOOPBACK = ("127.0.0.1", "::1" if has_ipv6() else "127.0.0.2")


class Sent(NamedTuple):
    """One direction of a connection, and its payload bytes."""

    saddr: str
    sport: int
    daddr: str
    dport: int
    size_bytes: int


def _listeners() -> list[socket.socket]:
    """Return listeners on one port of both addresses. Somebody may have the port that is free on one on the other.

    No client of another test, which may run in parallel, gets it: producers capture it in all network namespaces.
    """
    for _ in range(100):
        first = _server(LOOPBACK[0], free_port())
        try:
            return [first, _server(LOOPBACK[1], first.getsockname()[1])]
        except OSError:
            first.close()
    raise AssertionError("no port is free on both addresses")


class Echo:
    """A server on one port of both loopback addresses that sends back what it receives."""

    def __init__(self) -> None:
        self._listeners = _listeners()
        self.port: int = self._listeners[0].getsockname()[1]
        self._threads = [threading.Thread(target=self._serve, args=(each,)) for each in self._listeners]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()

    def __enter__(self) -> "Echo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(1 << 16):
                    connection.sendall(data)


class Steady:
    """A process that sends segments of 100 bytes on a few connections at a fixed rate; `stop` returns what was sent.

    With `cpu`, all traffic is sent and received on it.
    """

    def __init__(self, port: int, sends_per_second: int, cpu: int | None = None) -> None:
        self.port = port
        script = Path(__file__).parents[1] / "bench" / "traffic.py"
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, script, str(sends_per_second), "3600", str(port)]
        if cpu is not None:
            command = ["taskset", "--cpu-list", str(cpu), *command]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self) -> dict[int, int]:
        """Stop it, and return the payload bytes sent, by the sender's port."""
        output, _ = self._process.communicate(timeout=DEADLINE_S)
        return {int(port): size for port, size in json.loads(output).items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def exchange(port: int, connections: int, rounds: int = 5) -> list[Sent]:
    """Make connections to an Echo, one at a time, each with `rounds` data segments per direction.

    Every second one uses IPv6, if there is IPv6. All are closed when this returns. Client ports are distinct: on
    loopback, connect() takes a port in TIME_WAIT again after a second, and bind() does not.
    """
    sent: list[Sent] = []
    for number in range(connections):
        size_bytes = 1 + number % 997
        address = LOOPBACK[number % 2]
        with socket.create_connection((address, port), source_address=(address, 0)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ours, theirs = client.getsockname(), client.getpeername()
            for _ in range(rounds):
                client.sendall(bytes(size_bytes))
                left = size_bytes
                while left:
                    left -= len(client.recv(left))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        for source, target in ((ours, theirs), (theirs, ours)):
            sent.append(Sent(source[0], source[1], target[0], target[1], rounds * size_bytes))
    return sent
