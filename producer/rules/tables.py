"""Rules, and the tables by which the kernel decides which segments become events.

Rules are ordered. The first that matches a segment decides; if none does, the default decides. Each condition of a rule
is a list of which one value must match. An absent condition matches everything.

The kernel does not walk the rules. Each property of a segment (addresses, ports, owner, ...) is looked up once and
yields a class. Each class has the set of rules whose condition on that property it meets, one bit per rule. The sets
are ANDed, and the lowest bit is the first matching rule. So the cost does not grow with the number of rules
(bpf/rules.h).

Pure: names (users, namespaces, cgroups, interfaces) are already resolved to numbers.
"""

import ipaddress
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from producer.config.load import MOST_RULES as MOST_RULES
from producer.errors import ConfigError
from producer.events import STATES

# bpf/rules.h has these too, with MOST_RULES, as RULES, CLASSES and CGROUP_LEVELS.
MOST_CLASSES = 2048
MOST_CGROUP_LEVELS = 32
"""Rules can only name cgroups at these levels, counted from the root, 0. Sockets may be in deeper ones."""
MOST_PREFIXES = 130_000
MOST_VALUES = 8_000
PROPERTIES = ("netns", "cgroup", "uid", "interface", "state")
"""Properties that are looked up by number. The index is enum property in bpf/rules.h."""
_PORTS = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PortRange = tuple[int, int]
K = TypeVar("K", bound=Hashable)
RuleBits = int
"""A set of rules: bit i is rule i."""


@dataclass(frozen=True, slots=True)
class Action:
    """Whether a segment becomes an event of its stream, or a connection has records, and the sampling rate."""

    transmit: bool = True
    retransmit: bool = True
    flow: bool = True
    """Records of connections are never sampled."""
    sample_rate: int = 1
    """Keep one in `sample_rate`. Retransmits are sampled only with `sample_retransmits`."""
    sample_by_event: bool = False
    """Sample by event. Otherwise by connection, the same ones in both streams."""
    sample_retransmits: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. An empty condition matches everything. `address` and `port` match on either side."""

    name: str
    action: Action = Action()
    address: tuple[Network, ...] = ()
    local_address: tuple[Network, ...] = ()
    remote_address: tuple[Network, ...] = ()
    port: tuple[PortRange, ...] = ()
    local_port: tuple[PortRange, ...] = ()
    remote_port: tuple[PortRange, ...] = ()
    netns: tuple[int, ...] = ()
    """Inode numbers of network namespaces."""
    cgroup: tuple[int, ...] = ()
    """Ids of cgroups. Matches sockets in them or below."""
    uid: tuple[int, ...] = ()
    interface: tuple[int, ...] = ()
    """Interface indexes. Only cgroup_skb knows the interface; with other hooks the condition matches nothing."""
    state: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """The properties of a segment that rules use. None means unknown, and matches no condition."""

    local: Address
    remote: Address
    local_port: int
    remote_port: int
    netns: int | None = None
    cgroups: tuple[int, ...] = ()
    """The socket's cgroup and its ancestors, from the bottom up."""
    uid: int | None = None
    interface: int | None = None
    state: str | None = None


def met(rule: Rule, segment: Segment) -> dict[str, bool]:
    """Return whether the segment meets each condition that the rule has."""
    local, remote = mapped(segment.local), mapped(segment.remote)
    results = {
        "address": any(_in(local, net) or _in(remote, net) for net in rule.address),
        "local_address": any(_in(local, net) for net in rule.local_address),
        "remote_address": any(_in(remote, net) for net in rule.remote_address),
        "port": any(low <= p <= high for low, high in rule.port for p in (segment.local_port, segment.remote_port)),
        "local_port": any(low <= segment.local_port <= high for low, high in rule.local_port),
        "remote_port": any(low <= segment.remote_port <= high for low, high in rule.remote_port),
        "netns": segment.netns in rule.netns,
        "cgroup": any(cgroup in rule.cgroup for cgroup in segment.cgroups),
        "uid": segment.uid in rule.uid,
        "interface": segment.interface in rule.interface,
        "state": segment.state in rule.state,
    }
    return {name: result for name, result in results.items() if getattr(rule, name)}


@dataclass(frozen=True, slots=True)
class Sides:
    """For an address or port: the rules whose conditions it meets as local, as remote, and on either side."""

    local: RuleBits
    remote: RuleBits
    either: RuleBits


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The decision tables for the kernel. Class 0 is always the class of values that no rule names."""

    actions: Sequence[Action]
    """Of each rule; the last is the default."""
    address_classes: Sequence[Sides]
    prefixes: Sequence[tuple[bytes, int, int]]
    """Address (16 bytes, IPv4 as v4-mapped), length in bits, class. The longest prefix decides."""
    port_classes: Sequence[Sides]
    ports: NDArray[np.uint16]
    """The class of each port, shape (65536,)."""
    sets: Sequence[RuleBits]
    """Rules by class, for all PROPERTIES together."""
    unnamed: Mapping[str, int]
    """By property, the class of values that no rule names."""
    values: Mapping[str, Mapping[int, int]]
    """By property, the class of each named value. A cgroup's class includes the rules of its ancestors."""


def tables(
    rules: Sequence[Rule], default: Action, cgroups_above: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> Tables:
    """Compile rules. ConfigError if they do not fit the kernel's tables.

    `cgroups_above` has the ancestors of each cgroup that a rule names.
    """
    prefixes, address_classes = _addresses(rules)
    ports, port_classes = _ports(rules)
    sets, unnamed, values = _values(rules, cgroups_above)
    for what, count, limit in (
        ("rules", len(rules), MOST_RULES),
        ("networks", len(prefixes), MOST_PREFIXES),
        ("different combinations of networks", len(address_classes), MOST_CLASSES),
        ("different combinations of ports", len(port_classes), MOST_CLASSES),
        ("namespaces, cgroups, users, interfaces and states", sum(map(len, values.values())), MOST_VALUES),
        ("different combinations of these", len(sets), MOST_CLASSES),
    ):
        if count > limit:
            raise ConfigError(f"rules: too many {what}: {count}, at most {limit}")
    actions = [*(rule.action for rule in rules), default]
    return Tables(actions, address_classes, prefixes, port_classes, ports, sets, unnamed, values)


def only(addresses: Iterable[Address], ports: Iterable[int]) -> tuple[tuple[Rule, ...], Action]:
    """Return rules and default that keep only segments with one of the addresses and one of the ports, on either side.

    An empty list does not restrict.
    """
    networks = tuple(ipaddress.ip_network(address) for address in addresses)
    ranges = tuple((port, port) for port in ports)
    if not networks and not ranges:
        return (), Action()
    return (Rule("only", address=networks, port=ranges),), Action(transmit=False, retransmit=False, flow=False)


def _number(classes: dict[K, int], value: K) -> int:
    """Return the class of a value: the next free one if it is new."""
    return classes.setdefault(value, len(classes))


def _addresses(rules: Sequence[Rule]) -> tuple[list[tuple[bytes, int, int]], list[Sides]]:
    """Give each prefix the rules that name it or an enclosing one, since a trie lookup yields only the longest match.

    In the trie, IPv4 is at ::ffff:0:0/96 of IPv6. If an IPv6 network encloses that, an extra prefix separates the two.
    """
    named: dict[tuple[int, int], list[RuleBits]] = {}
    for side, condition in enumerate(("local_address", "remote_address", "address")):
        for i, rule in enumerate(rules):
            for network in getattr(rule, condition):
                named.setdefault(_prefix(network), [0, 0, 0])[side] |= 1 << i
    unnamed = Sides(_free(rules, "local_address"), _free(rules, "remote_address"), _free(rules, "address"))
    classes = {unnamed: 0}
    found: list[tuple[int, int, int]] = []
    nested: tuple[list[tuple[int, int, Sides]], ...] = ([], [])
    if any(_covers(*prefix, _MAPPED[0]) and not _is_ipv4(*prefix) for prefix in named):
        named.setdefault(_MAPPED, [0, 0, 0])
    for (packed, length), bits in sorted(named.items()):
        around = nested[_is_ipv4(packed, length)]
        while around and not _covers(around[-1][0], around[-1][1], packed):
            around.pop()
        outer = around[-1][2] if around else unnamed
        sides = Sides(outer.local | bits[0], outer.remote | bits[1], outer.either | bits[2])
        around.append((packed, length, sides))
        found.append((packed, length, _number(classes, sides)))
    # The most frequent first, so that the class of a long list does not change with other rules.
    order = [0, *(number for number, _ in Counter(number for *_, number in found).most_common() if number)]
    places = {number: place for place, number in enumerate(order)}
    prefixes = [(packed.to_bytes(16, "big"), length, places[number]) for packed, length, number in found]
    sides_by_number = list(classes)
    return prefixes, [sides_by_number[number] for number in order]


def _ports(rules: Sequence[Rule]) -> tuple[NDArray[np.uint16], list[Sides]]:
    """Sweep the ports upwards, adding and removing rules where their ranges begin and end."""
    changes: dict[int, list[RuleBits]] = {0: [0, 0, 0], _PORTS: [0, 0, 0]}
    for side, condition in enumerate(("local_port", "remote_port", "port")):
        for i, rule in enumerate(rules):
            for low, high in _merged(getattr(rule, condition)):
                for port in (low, high + 1):
                    changes.setdefault(port, [0, 0, 0])[side] ^= 1 << i
    bits = [_free(rules, "local_port"), _free(rules, "remote_port"), _free(rules, "port")]
    classes = {Sides(*bits): 0}
    ports = np.zeros(_PORTS, np.uint16)
    for start, end in itertools.pairwise(sorted(changes)):
        bits = [old ^ change for old, change in zip(bits, changes[start], strict=True)]
        ports[start:end] = _number(classes, Sides(*bits))
    return ports, list(classes)


def _values(
    rules: Sequence[Rule], cgroups_above: Mapping[int, Sequence[int]]
) -> tuple[list[RuleBits], dict[str, int], dict[str, dict[int, int]]]:
    classes = {0: 0}
    unnamed: dict[str, int] = {}
    numbers: dict[str, dict[int, int]] = {}
    for name in PROPERTIES:
        named: dict[int, RuleBits] = {}
        for i, rule in enumerate(rules):
            for value in getattr(rule, name):
                number = STATES.index(value) if name == "state" else value
                named[number] = named.get(number, 0) | 1 << i
        if name == "cgroup":
            named = {each: _united(named, each, cgroups_above.get(each, ())) for each in named}
        free = _free(rules, name)
        unnamed[name] = _number(classes, free)
        numbers[name] = {value: _number(classes, free | bits) for value, bits in named.items()}
    return list(classes), unnamed, numbers


def _united(named: Mapping[int, RuleBits], cgroup: int, above: Iterable[int]) -> RuleBits:
    bits = named[cgroup]
    for each in above:
        bits |= named.get(each, 0)
    return bits


def _free(rules: Sequence[Rule], condition: str) -> RuleBits:
    """Return the rules that do not have the condition."""
    return sum(1 << i for i, rule in enumerate(rules) if not getattr(rule, condition))


def _merged(ranges: Iterable[PortRange]) -> list[PortRange]:
    merged: list[PortRange] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def mapped(address: Address) -> bytes:
    """Return an address as 16 bytes, IPv4 as v4-mapped."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _prefix(network: Network) -> tuple[int, int]:
    length = network.prefixlen if network.version == 6 else 96 + network.prefixlen
    return int.from_bytes(mapped(network.network_address), "big"), length


_MAPPED = _prefix(ipaddress.IPv4Network("0.0.0.0/0"))


def _is_ipv4(prefix: int, length: int = 128) -> bool:
    """Whether a prefix is IPv4, even if written as IPv6 within ::ffff:0:0/96."""
    return length >= _MAPPED[1] and _covers(*_MAPPED, prefix)


def _in(packed: bytes, network: Network) -> bool:
    address, prefix = int.from_bytes(packed, "big"), _prefix(network)
    return _covers(*prefix, address) and _is_ipv4(*prefix) == _is_ipv4(address)


def _covers(prefix: int, length: int, address: int) -> bool:
    return prefix >> 128 - length == address >> 128 - length
