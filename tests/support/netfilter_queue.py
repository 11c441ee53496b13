"""A netfilter queue: a process decides on packets, as firewalls and intrusion detection do, which delays them.

The rule is made without iptables, which may not be installed, or nftables' `queue`, which a kernel may lack: struct
ipt_replace in linux/netfilter_ipv4/ip_tables.h. The queue's messages: linux/netfilter/nfnetlink_queue.h.
"""

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Iterator

from producer.demo.lab import Host
from tests.support.capture import inside

_NETLINK_NETFILTER, _SUBSYSTEM = 12, 3 << 8
_PACKET, _VERDICT, _CONFIG = 0, 1, 2  # messages
_COMMAND, _PARAMETERS, _MASK, _FLAGS = 1, 2, 4, 5  # attributes of the configuration
_PACKET_HEADER, _VERDICT_HEADER = 1, 2  # attributes
_BIND, _COPY_META, _WHOLE_SUPER_SEGMENTS, _ACCEPT = 1, 1, 4, 1
_SET_REPLACE = 64
_HEADER_BYTES = 20  # of a message, of netlink and of netfilter
_QUEUE = 7
_OLD_COUNTERS = ctypes.create_string_buffer(16 * 4)
"""Where the kernel writes those of the entries that it replaces."""


@contextlib.contextmanager
def queued(host: Host) -> Iterator[None]:
    """Let all TCP over IPv4 that a host sends pass a queue. OSError if the kernel has none."""
    with inside(host):
        queue = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    with queue:
        queue.send(_message(_CONFIG, _attribute(_COMMAND, struct.pack(">BBH", _BIND, 0, 0))))
        queue.send(_message(_CONFIG, _attribute(_PARAMETERS, struct.pack(">IB", 0, _COPY_META))))
        flags = struct.pack(">I", _WHOLE_SUPER_SEGMENTS)
        queue.send(_message(_CONFIG, _attribute(_MASK, flags) + _attribute(_FLAGS, flags)))
        with inside(host), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as table:
            table.setsockopt(socket.SOL_IP, _SET_REPLACE, _rules())
        stop = threading.Event()
        thread = threading.Thread(target=_accept, args=(queue, stop))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _accept(queue: socket.socket, stop: threading.Event) -> None:
    queue.settimeout(0.05)
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            data = queue.recv(1 << 16)
            while data:
                size, kind = struct.unpack_from("IH", data)
                if kind == _SUBSYSTEM | _PACKET:
                    # The first attribute is the packet's header.
                    (number,) = struct.unpack_from(">I", data, _HEADER_BYTES + 4)
                    verdict = struct.pack(">II", _ACCEPT, number)
                    queue.send(_message(_VERDICT, _attribute(_VERDICT_HEADER, verdict)))
                data = data[(size + 3) & ~3 :]


def _message(kind: int, body: bytes) -> bytes:
    body = struct.pack(">BBH", 0, 0, _QUEUE) + body
    return struct.pack("IHHII", 16 + len(body), _SUBSYSTEM | kind, 1, 0, 0) + body


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _rules() -> bytes:
    """Return the table `filter` with one rule in OUTPUT, in place of an empty one."""
    accept = _entry(0, b"", struct.pack("i", -_ACCEPT - 1))
    rule = _entry(socket.IPPROTO_TCP, b"NFQUEUE", struct.pack("H", _QUEUE))
    entries = [accept, accept, rule, accept, _entry(0, b"ERROR", b"ERROR".ljust(30, b"\0"))]
    size = len(accept)
    hooks = struct.pack("5I", 0, 0, size, 2 * size, 0)
    underflows = struct.pack("5I", 0, 0, size, 2 * size + len(rule), 0)
    numbers = struct.pack("III", 0b1110, len(entries), sum(map(len, entries)))
    head = b"filter".ljust(32, b"\0") + numbers + hooks + underflows + struct.pack("I", 4)
    return head + struct.pack("P", ctypes.addressof(_OLD_COUNTERS)) + b"".join(entries)


def _entry(protocol: int, target: bytes, data: bytes) -> bytes:
    data += bytes(-len(data) % 8)
    target_size, head = 32 + len(data), 112
    ip = bytes(80) + struct.pack("HBB", protocol, 0, 0)
    offsets = struct.pack("IHHI", 0, head, head + target_size, 0)
    return ip + offsets + bytes(16) + struct.pack("H29sB", target_size, target, 0) + data
