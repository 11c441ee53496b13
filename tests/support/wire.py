"""A capture of its own: TCP segments as a packet socket sees them leave an interface, independent of what is tested."""

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
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 26, 33, 35
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_AUXDATA, _PACKET_VNET_HDR = 263, 6, 8, 15
_VNET_HEADER = struct.Struct("=xBxxH4x")
"""struct virtio_net_hdr: the type and size of the pieces into which a super-segment will be cut."""
_ETHERNET_BYTES = 14
_BUFFER_BYTES = 1 << 26
_FIN, _ACK = 0x01, 0x10


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


class Packet(NamedTuple):
    """A packet at an interface. `segs`: how many segments it is cut into, which is 1 unless it is a super-segment."""

    segment: Segment
    segs: int
    ts_ns: int
    """CLOCK_REALTIME."""
    outgoing: bool


@contextmanager
def sniffed(port: int, interface: str = "lo", *, incoming: bool = False) -> Iterator[list[Packet]]:
    """Capture what goes out on an interface from or to a port, in order; complete when the context is left.

    The interface is one of the network namespace that this thread is in when the context begins. A super-segment is one
    packet, unless the stack has to cut it for the interface. `incoming`: capture what comes in, too.
    """
    packets: list[Packet] = []
    stop = threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as tap:
        _attach_filter(tap, port, incoming=incoming)
        tap.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        tap.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        tap.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        tap.bind((interface, _ETH_P_ALL))
        tap.settimeout(0.05)
        reader = threading.Thread(target=_read, args=(tap, port, packets, stop))
        reader.start()
        try:
            yield packets
        finally:
            stop.set()
            reader.join()
        _, dropped = struct.unpack("II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert dropped == 0, "the capture itself lost packets"


@contextmanager
def captured(port: int) -> Iterator["Counter[Segment]"]:
    """Count what goes out on the loopback interface from or to a port; complete when the context is left."""
    counted: Counter[Segment] = Counter()
    with sniffed(port) as packets:
        yield counted
    counted.update(packet.segment for packet in packets)


def late_acks(segments: "Counter[Segment]") -> "Counter[Segment]":
    """Return acknowledgements of a connection's end beyond the first: in time wait they have no socket."""
    ends = {
        (each.sport, each.dport, (each.seq + each.payload_len + 1) % (1 << 32))
        for each in segments
        if each.tcp_flags & _FIN
    }
    return Counter(
        {
            each: count - 1
            for each, count in segments.items()
            if count > 1
            and each.tcp_flags == _ACK
            and not each.payload_len
            and (each.sport, each.dport, each.seq) in ends
            and (each.dport, each.sport, each.ack_seq) in ends
        }
    )


def _attach_filter(tap: socket.socket, port: int, *, incoming: bool) -> None:
    """Let packets with the port on either side pass: instructions of classic BPF, struct sock_filter."""
    program = [
        (0x20, 0, 0, 0xFFFFF004),  # the packet's type, SKF_AD_PKTTYPE
        (0x15, 0, 0 if incoming else 15, _OUTGOING),
        (0x30, 0, 0, _ETHERNET_BYTES),  # the version of IP
        (0x74, 0, 0, 4),
        (0x15, 0, 5, 4),
        (0xB1, 0, 0, _ETHERNET_BYTES),  # IPv4: the header's length is in the packet
        (0x48, 0, 0, _ETHERNET_BYTES),
        (0x15, 8, 0, port),
        (0x48, 0, 0, _ETHERNET_BYTES + 2),
        (0x15, 6, 7, port),
        (0x30, 0, 0, _ETHERNET_BYTES + 6),  # IPv6: other headers may be in between, and _read looks at the ports
        (0x15, 0, 4, socket.IPPROTO_TCP),
        (0x28, 0, 0, _ETHERNET_BYTES + 40),
        (0x15, 2, 0, port),
        (0x28, 0, 0, _ETHERNET_BYTES + 42),
        (0x15, 0, 1, port),
        (0x06, 0, 0, 256),
        (0x06, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    tap.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))


def _read(tap: socket.socket, port: int, packets: list[Packet], stop: threading.Event) -> None:
    while True:
        try:
            packet, messages, _, address = tap.recvmsg(256, 128)
        except TimeoutError:
            if stop.is_set():
                return
            continue
        about = {(level, kind): data for level, kind, data in messages}
        (length,) = struct.unpack_from("=4xI", about[_SOL_PACKET, _PACKET_AUXDATA])
        segment = _parse(packet[_VNET_HEADER.size + _ETHERNET_BYTES :], length - _ETHERNET_BYTES)
        if segment and port in (segment.sport, segment.dport):
            seconds, nanoseconds = struct.unpack("=qq", about[socket.SOL_SOCKET, _SO_TIMESTAMPNS])
            cut, size = _VNET_HEADER.unpack_from(packet)
            segs = -(-segment.payload_len // size) if cut else 1
            packets.append(Packet(segment, segs, seconds * 10**9 + nanoseconds, address[2] == _OUTGOING))


def _parse(packet: bytes, length: int) -> Segment | None:
    """Return the segment in the beginning of a packet of this length."""
    version = packet[0] >> 4
    if version == 4:
        protocol, start, size = packet[9], (packet[0] & 15) * 4, struct.unpack_from(">H", packet, 2)[0]
        addresses = packet[12:16], packet[16:20]
    elif version == 6:
        protocol, start, size = packet[6], 40, 40 + struct.unpack_from(">H", packet, 4)[0]
        addresses = packet[8:24], packet[24:40]
        while protocol in (socket.IPPROTO_HOPOPTS, socket.IPPROTO_ROUTING, socket.IPPROTO_DSTOPTS):
            if size == 40:  # a jumbogram
                size += struct.unpack_from(">I", packet, start + 4)[0]
            protocol, start = packet[start], start + 8 * (packet[start + 1] + 1)
    else:
        return None
    if protocol != socket.IPPROTO_TCP:
        return None
    if size in (0, 40):  # more than the header's field can say
        size = length
    sport, dport, seq, ack_seq, offset, flags = struct.unpack_from(">HHIIBB", packet, start)
    saddr, daddr = (str(ip_address(each)) for each in addresses)
    return Segment(saddr, sport, daddr, dport, seq, ack_seq, flags, size - start - (offset >> 4) * 4)
