"""TCP traffic on loopback of which everything is known: what was sent, and an own capture of every segment."""

import ctypes
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
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
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
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as tap:
        _attach_filter(tap, port)
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


def _attach_filter(tap: socket.socket, port: int) -> None:
    """Let outgoing packets with the port on either side pass: instructions of classic BPF, struct sock_filter."""
    program = [
        (0x20, 0, 0, 0xFFFFF004),  # the packet's type, SKF_AD_PKTTYPE
        (0x15, 0, 13, _OUTGOING),
        (0x30, 0, 0, 0),  # the version of IP
        (0x74, 0, 0, 4),
        (0x15, 0, 5, 4),
        (0xB1, 0, 0, 0),  # IPv4: the header's length is in the packet
        (0x48, 0, 0, 0),
        (0x15, 6, 0, port),
        (0x48, 0, 0, 2),
        (0x15, 4, 5, port),
        (0x28, 0, 0, 40),  # IPv6
        (0x15, 2, 0, port),
        (0x28, 0, 0, 42),
        (0x15, 0, 1, port),
        (0x06, 0, 0, 256),
        (0x06, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    tap.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))


def _read(tap: socket.socket, port: int, segments: "Counter[Segment]", stop: threading.Event) -> None:
    while True:
        try:
            packet = tap.recv(256)
        except TimeoutError:
            if stop.is_set():
                return
            continue
        segment = _parse(packet)
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
