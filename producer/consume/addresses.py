"""Addresses in records: whoever may write to a topic chooses their text, so it may not be an address."""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network


@lru_cache(1 << 16)
def parsed(text: str) -> IPv4Address | IPv6Address | None:
    """Return an address; None if the text is not one."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def network(text: str) -> IPv4Network | IPv6Network:
    """Return an address or a network, IPv4-mapped ones as IPv4, as they are in records; ValueError for other text."""
    found = ip_network(text, strict=False)
    mapped = None if isinstance(found, IPv4Network) else found.network_address.ipv4_mapped
    return found if mapped is None else IPv4Network((mapped, found.prefixlen - 96))


def is_within(text: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """Return whether an address is in one of the networks."""
    address = parsed(text)
    return address is not None and any(address in network for network in networks)


def subnet(text: str, prefix: int = 24, prefix_v6: int = 64) -> str:
    """Return an address's network, with these prefix lengths; other text is returned as it is."""
    address = parsed(text)
    if address is None:
        return text
    return str(ip_network((address.packed, prefix if address.version == 4 else prefix_v6), strict=False))
