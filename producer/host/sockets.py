"""This process's sockets by descriptor. Standard library only."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SO_COOKIE = 57


def cookie(descriptor: int) -> bytes:
    """Return the kernel's cookie of a socket, 8 bytes, which is unique within a boot."""
    with _borrowed(descriptor) as own:
        return own.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def listener_at(address: Address, port: int) -> int:
    """Return the descriptor of this process's socket that listens on an endpoint. Raises LookupError."""
    for name in os.listdir("/proc/self/fd"):
        # Other threads may close descriptors meanwhile, and not all are TCP sockets.
        with contextlib.suppress(OSError, ValueError):
            if _listens(int(name)) and _local_end(int(name)) == (address, port):
                return int(name)
    raise LookupError(f"this process does not listen on {address} port {port}")


def _local_end(descriptor: int) -> tuple[Address, int]:
    """Return the address and port that a socket is bound to."""
    with _borrowed(descriptor) as own:
        address, port, *_ = own.getsockname()
    return ipaddress.ip_address(address), port


def _listens(descriptor: int) -> bool:
    with _borrowed(descriptor) as own:
        return own.family in (socket.AF_INET, socket.AF_INET6) and bool(
            own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    with socket.socket(fileno=os.dup(descriptor)) as own:
        yield own
