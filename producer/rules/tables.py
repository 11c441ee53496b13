"""Rules: which flows become events, as the configuration says it, and as the tables that the kernel decides by.

Rules are ordered, the first that matches a segment decides, and a default stands behind the last. Each condition of a
rule is a list, of which one value must match; a condition that is absent matches everything.

The kernel does not walk the rules. Each property of a segment (its addresses, ports, owner, ...) is looked up once and
yields a class, and each class has a set of the rules whose condition on that property it meets: a bit for each rule.
The sets are ANDed; the lowest bit is the first rule that matches. So the cost does not grow with the number of rules
(bpf/rules.h).

Pure: names (users, namespaces, cgroups, interfaces) have been made numbers before they come here.
"""

import ipaddress
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from producer.errors import ConfigError
from producer.events import STATES

# bpf/rules.h has these too, as RULES, CLASSES and CGROUP_LEVELS.
MOST_RULES = 1024
MOST_CLASSES = 2048
MOST_CGROUP_LEVELS = 32
"""A rule names cgroups of these levels alone, from the root, 0, on; the sockets may be in deeper ones."""
MOST_PREFIXES = 130_000
MOST_VALUES = 8_000
PROPERTIES = ("netns", "cgroup", "uid", "interface", "state")
"""What is looked up as a number; the index is bpf/rules.h's enum property."""
_PORTS = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PortRange = tuple[int, int]
K = TypeVar("K", bound=Hashable)
RuleBits = int
"""A set of rules: bit i is rule i."""


@dataclass(frozen=True, slots=True)
class Action:
    """What becomes of a segment: an event of its stream or not, and of how many such flows or events one is taken."""

    transmit: bool = True
    retransmit: bool = True
    sample_rate: int = 1
    """One in so many is taken; a retransmit is not sampled unless `sample_retransmits` says so."""
    sample_by_event: bool = False
    """Chosen event by event; otherwise connection by connection, the same connections in both streams."""
    sample_retransmits: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. An empty condition matches everything; addresses and ports without a side match on either."""

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
    """Ids of cgroups: the socket's cgroup is one of them, or below one."""
    uid: tuple[int, ...] = ()
    interface: tuple[int, ...] = ()
    """Interface indexes; a hook that does not know the interface (any but cgroup_skb) matches none."""
    state: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """The properties of a segment that rules look at; None where it is not known, which matches no condition."""

    local: Address
    remote: Address
    local_port: int
    remote_port: int
    netns: int | None = None
    cgroups: tuple[int, ...] = ()
    """The socket's cgroup and all above it, from the socket's own up."""
    uid: int | None = None
    interface: int | None = None
    state: str | None = None


def first_match(rules: Sequence[Rule], segment: Segment) -> int | None:
    """Return the index of the rule that decides, by going through the rules; None: the default decides."""
    return next((i for i, rule in enumerate(rules) if all(met(rule, segment).values())), None)


def met(rule: Rule, segment: Segment) -> dict[str, bool]:
    """Return each condition that the rule has, and whether the segment meets it."""
    local, remote = _mapped(segment.local), _mapped(segment.remote)
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
    """For an address or a port: the rules whose condition it meets as the local one, the remote one, and either."""

    local: RuleBits
    remote: RuleBits
    either: RuleBits


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What the kernel decides by. Class 0 of each is that of a value that no rule names."""

    actions: Sequence[Action]
    """Of each rule, and last the default."""
    address_classes: Sequence[Sides]
    prefixes: Sequence[tuple[bytes, int, int]]
    """Address (16 bytes, IPv4 as v4-mapped), length in bits, class: the longest prefix counts."""
    port_classes: Sequence[Sides]
    ports: NDArray[np.uint16]
    """The class of each port, shape (65536,)."""
    sets: Sequence[RuleBits]
    """Of all PROPERTIES: the rules by class."""
    unnamed: Mapping[str, int]
    """The class of a value that no rule names, by property."""
    values: Mapping[str, Mapping[int, int]]
    """The class by value, by property; a cgroup's has the sets of those above it."""

    def decide(self, segment: Segment) -> int:
        """Return the index of the action that decides, as bpf/rules.h does it."""
        local, remote = (self._address(address) for address in (segment.local, segment.remote))
        local_port, remote_port = (self.port_classes[self.ports[p]] for p in (segment.local_port, segment.remote_port))
        left = local.local & remote.remote & (local.either | remote.either)
        left &= local_port.local & remote_port.remote & (local_port.either | remote_port.either)
        state = None if segment.state is None else STATES.index(segment.state)
        named = (cgroup for cgroup in segment.cgroups if cgroup in self.values["cgroup"])
        numbers = (segment.netns, next(named, None), segment.uid, segment.interface, state)
        for name, value in zip(PROPERTIES, numbers, strict=True):
            number = self.unnamed[name] if value is None else self.values[name].get(value, self.unnamed[name])
            left &= self.sets[number]
        return (left & -left).bit_length() - 1 if left else len(self.actions) - 1

    def _address(self, address: Address) -> Sides:
        packed = int.from_bytes(_mapped(address), "big")
        best, found = -1, 0
        for prefix, length, number in self.prefixes:
            if length > best and packed >> 128 - length == int.from_bytes(prefix, "big") >> 128 - length:
                best, found = length, number
        return self.address_classes[found]


def tables(
    rules: Sequence[Rule], default: Action, cgroups_above: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> Tables:
    """Compile rules; ConfigError where there are more than the kernel's tables hold.

    `cgroups_above` has, for each cgroup that a rule names, those above it.
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
            raise ConfigError(f"rules: {count} {what} are too many: at most {limit}")
    actions = [*(rule.action for rule in rules), default]
    return Tables(actions, address_classes, prefixes, port_classes, ports, sets, unnamed, values)


def only(addresses: Iterable[Address], ports: Iterable[int]) -> tuple[tuple[Rule, ...], Action]:
    """Return rules and default that take just what has one of the addresses and one of the ports, on either side.

    An empty list does not restrict.
    """
    networks = tuple(ipaddress.ip_network(address) for address in addresses)
    ranges = tuple((port, port) for port in ports)
    if not networks and not ranges:
        return (), Action()
    return (Rule("only", address=networks, port=ranges),), Action(transmit=False, retransmit=False)


def filtered(addresses: Iterable[Address] = (), ports: Iterable[int] = ()) -> Tables:
    """Return the tables of `only`."""
    return tables(*only(addresses, ports))


class _Classes(Generic[K]):
    """Numbers different values in the order of their coming; the first is class 0."""

    def __init__(self, nothing: K) -> None:
        self._numbers = {nothing: 0}

    @property
    def all(self) -> list[K]:
        return list(self._numbers)

    def number(self, value: K) -> int:
        return self._numbers.setdefault(value, len(self._numbers))


def _addresses(rules: Sequence[Rule]) -> tuple[list[tuple[bytes, int, int]], list[Sides]]:
    """Each prefix has the rules that name it, and those that name one around it: the trie yields the longest alone.

    IPv4 lies within IPv6 there, at ::ffff:0:0/96: where a network of IPv6 is around it, a prefix of its own parts them.
    """
    named: dict[tuple[int, int], list[RuleBits]] = {}
    for side, condition in enumerate(("local_address", "remote_address", "address")):
        for i, rule in enumerate(rules):
            for network in getattr(rule, condition):
                named.setdefault(_prefix(network), [0, 0, 0])[side] |= 1 << i
    unnamed = Sides(_free(rules, "local_address"), _free(rules, "remote_address"), _free(rules, "address"))
    classes = _Classes(unnamed)
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
        found.append((packed, length, classes.number(sides)))
    # The most frequent first, so that a long list keeps its number when others change.
    order = [0, *(number for number, _ in Counter(number for *_, number in found).most_common() if number)]
    places = {number: place for place, number in enumerate(order)}
    prefixes = [(packed.to_bytes(16, "big"), length, places[number]) for packed, length, number in found]
    sides_by_number = classes.all
    return prefixes, [sides_by_number[number] for number in order]


def _ports(rules: Sequence[Rule]) -> tuple[NDArray[np.uint16], list[Sides]]:
    """Go up through the ports, and take rules in and out where their ranges begin and end."""
    turns: dict[int, list[RuleBits]] = {0: [0, 0, 0], _PORTS: [0, 0, 0]}
    for side, condition in enumerate(("local_port", "remote_port", "port")):
        for i, rule in enumerate(rules):
            for low, high in _merged(getattr(rule, condition)):
                for turn in (low, high + 1):
                    turns.setdefault(turn, [0, 0, 0])[side] ^= 1 << i
    bits = [_free(rules, "local_port"), _free(rules, "remote_port"), _free(rules, "port")]
    classes = _Classes(Sides(*bits))
    ports = np.zeros(_PORTS, np.uint16)
    places = sorted(turns)
    for start, end in itertools.pairwise(places):
        bits = [old ^ turn for old, turn in zip(bits, turns[start], strict=True)]
        ports[start:end] = classes.number(Sides(*bits))
    return ports, classes.all


def _values(
    rules: Sequence[Rule], cgroups_above: Mapping[int, Sequence[int]]
) -> tuple[list[RuleBits], dict[str, int], dict[str, dict[int, int]]]:
    classes = _Classes(0)
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
        unnamed[name] = classes.number(free)
        numbers[name] = {value: classes.number(free | bits) for value, bits in named.items()}
    return classes.all, unnamed, numbers


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


def _mapped(address: Address) -> bytes:
    """Return an address as 16 bytes, IPv4 as v4-mapped."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _prefix(network: Network) -> tuple[int, int]:
    length = network.prefixlen if network.version == 6 else 96 + network.prefixlen
    return int.from_bytes(_mapped(network.network_address), "big"), length


_MAPPED = _prefix(ipaddress.IPv4Network("0.0.0.0/0"))


def _is_ipv4(prefix: int, length: int = 128) -> bool:
    """Whether a prefix is one of IPv4: also where it was written as IPv6, within ::ffff:0:0/96."""
    return length >= _MAPPED[1] and _covers(*_MAPPED, prefix)


def _in(packed: bytes, network: Network) -> bool:
    address, prefix = int.from_bytes(packed, "big"), _prefix(network)
    return _covers(*prefix, address) and _is_ipv4(*prefix) == _is_ipv4(address)


def _covers(prefix: int, length: int, address: int) -> bool:
    return prefix >> 128 - length == address >> 128 - length
