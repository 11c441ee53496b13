"""The tables of the rules in the kernel's maps (bpf/rules.h). Two generations: one active, one to fill.

The switch is one 64-bit word, so that each segment is decided entirely by the old rules or entirely by the new ones. A
generation is refilled only when no program can still be reading it.
"""

import struct
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from producer.events import RETRANSMITS, TRANSMITS
from producer.kernel import bpf_syscall
from producer.rules.tables import MOST_CLASSES, MOST_RULES, PROPERTIES, Action, RuleBits, Sides, Tables

_SET_BYTES = MOST_RULES // 8
_PORT_GROUP = 4
_GENERATION_BITS = 32
_GENERATION = struct.Struct("<8I")
"""struct rule_generation; the last member is the generation of the prefixes."""
_PREFIX_KEY_BYTES, _VALUE_KEY_BYTES = 24, 16
_UNKNOWN = b""
"""Stands for the value of an element that another process wrote."""
_ELEMENTS_PER_STEP = 1024
_NO_CLASS = 0xFFFF
"""Not the number of any class, so that each port is written."""


class RuleMaps:
    """Writes tables into the maps, given by name. Writes only differences.

    `version` counts the activated tables.
    """

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._maps = maps
        active = active_rules(maps["rules_active"])
        self.version = active >> 1
        self._arrays: dict[str, dict[bytes, bytes]] = {}
        """The values written by this process, by map and key."""
        # Maps that were taken over contain elements of another process.
        generation = bpf_syscall.lookup(maps["rule_generations"], _index(active & 1), _GENERATION.size)
        self._prefix_generation: int = _GENERATION.unpack(generation)[-1]
        prefixes = bpf_syscall.keys(maps["rule_prefixes"], _PREFIX_KEY_BYTES)
        values = bpf_syscall.keys(maps["rule_values"], _VALUE_KEY_BYTES)
        self._prefixes = [{key: _UNKNOWN for key in prefixes if key[4:8] == _index(each)} for each in (0, 1)]
        self._values = [{key: _UNKNOWN for key in values if key[:4] == _index(each)} for each in (0, 1)]
        self._prefixes_in_use: Sequence[tuple[bytes, int, int]] | None = None
        shape = (2, (1 << 16) // _PORT_GROUP, _PORT_GROUP)
        self._ports = np.full(shape, _NO_CLASS, np.uint16) if active else np.zeros(shape, np.uint16)

    def put(self, tables: Tables) -> int:
        """Activate tables atomically, and return their version. After an OSError the old ones stay active."""
        for _ in self.put_in_steps(tables):
            pass
        return self.version

    def put_in_steps(self, tables: Tables) -> Generator[None]:
        """Do the same in steps of 1,024 elements: 130,000 networks take seconds. The last step activates."""
        version = self.version + 1
        generation = version & 1
        # The active prefixes are reused if they are unchanged.
        prefixes = self._prefix_generation if tables.prefixes == self._prefixes_in_use else 1 - self._prefix_generation
        bpf_syscall.wait_for_programs()
        for number, _ in enumerate(self._fill(generation, prefixes, tables), 1):
            if number % _ELEMENTS_PER_STEP == 0:
                yield
        set_active_rules(self._maps["rules_active"], version << 1 | generation)
        self.version, self._prefix_generation = version, prefixes
        self._prefixes_in_use = tables.prefixes

    def _fill(self, generation: int, prefixes: int, tables: Tables) -> Iterator[None]:
        """Fill a generation of the tables, which belongs to a generation of the prefixes. Yields after each element."""
        first_action, first_class = generation * (MOST_RULES + 1), generation * MOST_CLASSES
        *actions, default = tables.actions
        yield from self._array("rule_actions", first_action, map(_action, actions))
        yield from self._array("rule_actions", first_action + MOST_RULES, [_action(default)])
        yield from self._array("rule_addresses", first_class, map(_sides, tables.address_classes))
        yield from self._array("rule_ports", first_class, map(_sides, tables.port_classes))
        yield from self._array("rule_sets", first_class, map(_bits, tables.sets))
        yield from self._fill_ports(generation, tables.ports)
        if prefixes != self._prefix_generation:
            yield from self._replace("rule_prefixes", self._prefixes[prefixes], _prefixes(prefixes, tables))
        values = {
            struct.pack("<IIQ", generation, PROPERTIES.index(name), value): _index(number)
            for name, numbers in tables.values.items()
            for value, number in numbers.items()
        }
        yield from self._replace("rule_values", self._values[generation], values)
        by_segment = any(tables.values[name] for name in ("interface", "state"))
        unnamed = (tables.unnamed[name] for name in PROPERTIES)
        packed = _GENERATION.pack(len(actions), by_segment, *unnamed, prefixes)
        yield from self._array("rule_generations", generation, [packed])

    def _fill_ports(self, generation: int, ports: NDArray[np.uint16]) -> Iterator[None]:
        current, target = self._ports[generation], ports.reshape(-1, _PORT_GROUP)
        for group in np.flatnonzero((current != target).any(axis=1)).tolist():
            index = _index(generation * len(target) + group)
            bpf_syscall.update(self._maps["rule_port_classes"], index, target[group].tobytes())
            current[group] = target[group]
            yield

    def _array(self, name: str, first: int, values: Iterable[bytes]) -> Iterator[None]:
        items = ((_index(index), value) for index, value in enumerate(values, first))
        return self._write(name, self._arrays.setdefault(name, {}), items)

    def _replace(self, name: str, current: dict[bytes, bytes], target: Mapping[bytes, bytes]) -> Iterator[None]:
        """Change a map from `current` to `target`. `current` is updated step by step, so it is right after an error."""
        for key in current.keys() - target.keys():
            bpf_syscall.delete(self._maps[name], key)
            del current[key]
            yield
        yield from self._write(name, current, target.items())

    def _write(self, name: str, current: dict[bytes, bytes], items: Iterable[tuple[bytes, bytes]]) -> Iterator[None]:
        for key, value in items:
            if current.get(key) != value:
                bpf_syscall.update(self._maps[name], key, value)
                current[key] = value
                yield


def active_rules(map_fd: int) -> int:
    """Return the word of the map rules_active: version << 1 | generation; 0: capture nothing."""
    return int.from_bytes(bpf_syscall.lookup(map_fd, _index(0), 8), "little")


def set_active_rules(map_fd: int, active: int) -> None:
    """Change that word, at once for all programs."""
    bpf_syscall.update(map_fd, _index(0), active.to_bytes(8, "little"))


def _prefixes(generation: int, tables: Tables) -> dict[bytes, bytes]:
    numbers = [_index(number) for number in range(len(tables.address_classes))]
    return {
        struct.pack("<II", _GENERATION_BITS + length, generation) + prefix: numbers[number]
        for prefix, length, number in tables.prefixes
    }


def _index(number: int) -> bytes:
    return struct.pack("<I", number)


def _action(action: Action) -> bytes:
    """Pack struct rule_action; its arrays are by stream."""
    keep, sampled = [0, 0], [0, 0]
    keep[TRANSMITS.index], keep[RETRANSMITS.index] = action.transmit, action.retransmit
    sampled[TRANSMITS.index], sampled[RETRANSMITS.index] = True, action.sample_retransmits
    return struct.pack("<I6B2x", action.sample_rate, *keep, *sampled, action.sample_by_event, action.flow)


def _bits(bits: RuleBits) -> bytes:
    return bits.to_bytes(_SET_BYTES, "little")


def _sides(sides: Sides) -> bytes:
    return _bits(sides.local) + _bits(sides.remote) + _bits(sides.either)
