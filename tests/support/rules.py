"""Rules in tests: tables of a filter, and two ways to decide a segment."""

from collections.abc import Iterable, Sequence

from producer.events import STATES
from producer.rules.tables import PROPERTIES, Address, Rule, Segment, Sides, Tables, mapped, met, only, tables


def filtered(addresses: Iterable[Address] = (), ports: Iterable[int] = ()) -> Tables:
    """Return the tables that keep only segments with one of the addresses and one of the ports, on either side."""
    return tables(*only(addresses, ports))


def first_match(rules: Sequence[Rule], segment: Segment) -> int | None:
    """Return the index of the rule that decides, by walking the rules; None is the default."""
    return next((i for i, rule in enumerate(rules) if all(met(rule, segment).values())), None)


def decide(compiled: Tables, segment: Segment) -> int:
    """Return the index of the action for a segment, by the algorithm of bpf/rules.h."""
    local, remote = (_sides(compiled, address) for address in (segment.local, segment.remote))
    local_port, remote_port = (
        compiled.port_classes[compiled.ports[port]] for port in (segment.local_port, segment.remote_port)
    )
    matching = local.local & remote.remote & (local.either | remote.either)
    matching &= local_port.local & remote_port.remote & (local_port.either | remote_port.either)
    state = None if segment.state is None else STATES.index(segment.state)
    named = (cgroup for cgroup in segment.cgroups if cgroup in compiled.values["cgroup"])
    numbers = (segment.netns, next(named, None), segment.uid, segment.interface, state)
    for name, value in zip(PROPERTIES, numbers, strict=True):
        unnamed = compiled.unnamed[name]
        matching &= compiled.sets[unnamed if value is None else compiled.values[name].get(value, unnamed)]
    return (matching & -matching).bit_length() - 1 if matching else len(compiled.actions) - 1


def _sides(compiled: Tables, address: Address) -> Sides:
    packed = int.from_bytes(mapped(address), "big")
    best, found = -1, 0
    for prefix, length, number in compiled.prefixes:
        if length > best and packed >> 128 - length == int.from_bytes(prefix, "big") >> 128 - length:
            best, found = length, number
    return compiled.address_classes[found]
