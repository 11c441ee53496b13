"""TCP traffic on loopback of which everything is known: what was sent, and an own capture of every segment."""

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import NamedTuple

_ETH_P_ALL = 3
_OUTGOING = 4
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_BUFFER_BYTES = 1 << 26
LOOPBACK = ("127.0.0.1", "::1")


class Segment(NamedTuple):
    """A TCP segment as it was on the wire."""

    saddr: str
    sport: int
    daddr: str
    dport: int
    seq: int
    ack_seq: int
    tcp_flags: int
    payload_len: int


class Sent(NamedTuple):
    """A direction of a connection, and the bytes that were sent in it."""

    saddr: str
    sport: int
    daddr: str
    dport: int
    size_bytes: int


class Echo:
    """A server on one port of 127.0.0.1 and ::1 that sends back what it receives."""

    def __init__(self) -> None:
        first = socket.create_server((LOOPBACK[0], 0), backlog=1024)
        self.port: int = first.getsockname()[1]
        second = socket.create_server((LOOPBACK[1], self.port), family=socket.AF_INET6, backlog=1024)
        self._listeners = [first, second]
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


def exchange(port: int, connections: int, rounds: int = 5) -> list[Sent]:
    """Make connections to an Echo, one after the other, each with `rounds` segments of data in each direction.

    Every second one is of IPv6. Each has ended in good order when this returns.
    """
    sent: list[Sent] = []
    for number in range(connections):
        size_bytes = 1 + number % 997
        with socket.create_connection((LOOPBACK[number % 2], port)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ours, theirs = client.getsockname()[:2], client.getpeername()[:2]
            for _ in range(rounds):
                client.sendall(bytes(size_bytes))
                left = size_bytes
                while left:
                    left -= len(client.recv(left))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        sent += [Sent(*ours, *theirs, rounds * size_bytes), Sent(*theirs, *ours, rounds * size_bytes)]
    return sent


@contextmanager
def captured(port: int) -> Iterator["Counter[Segment]"]:
    """Capture what goes out on the loopback interface from or to a port; complete when the context is left."""
    segments: Counter[Segment] = Counter()
    stop = threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        tap.bind(("lo", _ETH_P_ALL))
        tap.settimeout(0.05)
        reader = threading.Thread(target=_read, args=(tap, port, segments, stop))
        reader.start()
        try:
            yield segments
        finally:
            stop.set()
            reader.join()
        _, dropped = struct.unpack("II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert dropped == 0, "the capture itself lost segments"


def _read(tap: socket.socket, port: int, segments: "Counter[Segment]", stop: threading.Event) -> None:
    while True:
        try:
            packet, where = tap.recvfrom(256)
        except TimeoutError:
            if stop.is_set():
                return
            continue
        segment = _parse(packet) if where[2] == _OUTGOING else None
        if segment and port in (segment.sport, segment.dport):
            segments[segment] += 1


def _parse(packet: bytes) -> Segment | None:
    version = packet[0] >> 4
    if version == 4 and packet[9] == socket.IPPROTO_TCP:
        start, size = (packet[0] & 15) * 4, struct.unpack_from(">H", packet, 2)[0]
        addresses = packet[12:16], packet[16:20]
    elif version == 6 and packet[6] == socket.IPPROTO_TCP:
        start, size = 40, 40 + struct.unpack_from(">H", packet, 4)[0]
        addresses = packet[8:24], packet[24:40]
    else:
        return None
    sport, dport, seq, ack_seq, offset, flags = struct.unpack_from(">HHIIBB", packet, start)
    saddr, daddr = (str(ip_address(each)) for each in addresses)
    return Segment(saddr, sport, daddr, dport, seq, ack_seq, flags, size - start - (offset >> 4) * 4)
