"""A host's remote side, crafted by hand: TCP segments enter through a TUN device, from which the answers are read.

The device is synchronous and drops nothing: there is no backlog or packet filter between the kernel and the account.
"""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from producer.demo.lab import Host
from tests.support.capture import inside
from tests.support.wire import Segment

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_INTERFACE = "far0"
_QUEUE = 32_767
"""Length of the queue of unread packets: the most that some kernels allow."""


class Tun:
    """The device in a host's namespace. `near` has the host's addresses on it, `far` those of the far side."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.near = {4: "10.222.0.1", 6: "fd6f:222::1"}
        self.far = {4: "10.222.0.2", 6: "fd6f:222::2"}
        self.sent: list[Segment] = []
        """All packets read so far."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            with inside(self._host):
                self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                stack.callback(os.close, self._device)
                fcntl.ioctl(
                    self._device, _TUNSETIFF, struct.pack("16sH22x", _INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI)
                )
                self.ifindex = socket.if_nametoindex(_INTERFACE)
            for argv in (
                ("ip", "link", "set", _INTERFACE, "txqueuelen", str(_QUEUE), "up"),
                ("ip", "address", "add", f"{self.near[4]}/24", "dev", _INTERFACE),
                ("ip", "address", "add", f"{self.near[6]}/64", "dev", _INTERFACE, "nodad"),
            ):
                subprocess.run(self._host.command(*argv), check=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def hold(self, count: int) -> None:
        """Limit the queue of unread packets. The device rejects further ones, with an error to the sender."""
        for argv in (
            ("ip", "link", "set", _INTERFACE, "txqueuelen", str(count)),
            ("tc", "qdisc", "replace", "dev", _INTERFACE, "root", "noqueue"),
        ):
            subprocess.run(self._host.command(*argv), check=True)

    def send(
        self,
        version: int,
        sport: int,
        dport: int,
        tcp_flags: int,
        *,
        seq: int = 7,
        ack_seq: int = 0,
        payload: bytes = b"",
        window: int = 65_535,
    ) -> None:
        """Send a segment from the far side. The host has handled it when this returns."""
        ends = b"".join(ipaddress.ip_address(each[version]).packed for each in (self.far, self.near))
        pseudo = ends + struct.pack("!HH", socket.IPPROTO_TCP, 20 + len(payload))
        start = struct.pack("!HHIIBBH", sport, dport, seq, ack_seq, 5 << 4, tcp_flags, window)
        padded = payload + bytes(len(payload) % 2)
        tcp = start + struct.pack("!HH", _checksum(pseudo + start + bytes(4) + padded), 0) + payload
        os.write(self._device, _ip_header(version, ends, len(tcp)) + tcp)

    def read(self) -> list[Segment]:
        """Read what the host has sent since, and return all of it, in order."""
        self.sent += self._packets()
        return self.sent

    def _packets(self) -> Iterator[Segment]:
        with contextlib.suppress(BlockingIOError):
            while True:
                segment = _parse(os.read(self._device, 1 << 16))
                if segment:
                    yield segment


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def _ip_header(version: int, ends: bytes, length: int) -> bytes:
    if version == 6:
        return struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64) + ends
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, 0, 0, 64, socket.IPPROTO_TCP)
    return start + struct.pack("!H", _checksum(start + b"\0\0" + ends)) + ends


def _parse(packet: bytes) -> Segment | None:
    """Return the TCP segment in an IP packet without extensions; None for other packets."""
    version = packet[0] >> 4
    offset, protocol, addresses = (40, packet[6], 8) if version == 6 else ((packet[0] & 15) * 4, packet[9], 12)
    if protocol != socket.IPPROTO_TCP:
        return None
    middle = (addresses + offset) // 2 if version == 6 else addresses + 4
    saddr, daddr = (
        str(ipaddress.ip_address(each)) for each in (packet[addresses:middle], packet[middle:][: middle - addresses])
    )
    sport, dport, seq, ack_seq, length, tcp_flags = struct.unpack_from("!HHIIBB", packet, offset)
    return Segment(saddr, sport, daddr, dport, seq, ack_seq, tcp_flags, len(packet) - offset - (length >> 4) * 4)
