"""Endpoints as text: `address:port`, with an IPv6 address in brackets. Standard library only."""

import re

MASK = "***"
"""In place of a secret."""
_SERVER = re.compile(r"[^/?#]*//[^/?#]*")


def endpoint(address: str, port: int) -> str:
    """Return an address or host name, and a port, as text."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split(text: str) -> tuple[str, int]:
    """Return the address without brackets, and the port. Raises ValueError if the port is not a number."""
    address, _, port = text.strip().rpartition(":")
    return address.removeprefix("[").removesuffix("]"), int(port)


def without_path(url: str) -> str:
    """Return a URL with all that follows its host masked: a webhook's path or query is often its secret."""
    found = _SERVER.match(url)
    server = found[0] if found else ""
    return url if url in (server, f"{server}/") else f"{server}/{MASK}"
