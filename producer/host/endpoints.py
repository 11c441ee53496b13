"""Endpoints as text: `address:port`, with an IPv6 address in brackets. Standard library only."""


def endpoint(address: str, port: int) -> str:
    """Return an address or host name, and a port, as text."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split(text: str) -> tuple[str, int]:
    """Return the address without brackets, and the port. Raises ValueError if the port is not a number."""
    address, _, port = text.strip().rpartition(":")
    return address.removeprefix("[").removesuffix("]"), int(port)
