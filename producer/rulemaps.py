"""The rules' tables in the kernel's maps (bpf/rules.h): of two generations one decides while the other is filled.

The switch is one 64-bit word, so that each segment falls wholly under the old rules or under the new ones. A generation
is filled again only when no program can still be reading it.
"""

import struct
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from producer import sysbpf
from producer.events import RETRANSMITS, TRANSMITS
from producer.rules import MOST_CLASSES, MOST_RULES, PROPERTIES, Action, RuleBits, Sides, Tables

_SET_BYTES = MOST_RULES // 8
_PORT_GROUP = 4
_GENERATION_BITS = 32
_KEY_BYTES = {"rule_prefixes": 24, "rule_values": 16}
_UNKNOWN = np.full(1 << 16, 0xFFFF, np.uint16)
"""No class has this number, so that each port is written."""


class RuleMaps:
    """Writes tables into the maps, given by name. `version` counts the tables that were put in force."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._maps = maps
        (active,) = struct.unpack("<Q", sysbpf.lookup(maps["rules_active"], _index(0), 8))
        self.version: int = active >> 1
        # Maps that were taken over have what another process inserted.
        prefixes, values = (sysbpf.keys(maps[name], size) for name, size in _KEY_BYTES.items())
        self._prefixes = [[key for key in prefixes if key[4:8] == _index(generation)] for generation in (0, 1)]
        self._values = [[key for key in values if key[:4] == _index(generation)] for generation in (0, 1)]
        self._ports: list[NDArray[np.uint16]] = [np.zeros(1 << 16, np.uint16) if not active else _UNKNOWN] * 2

    def put(self, tables: Tables) -> int:
        """Put tables in force at once, and return their version; an OSError leaves the old ones in force."""
        version = self.version + 1
        generation = version & 1
        sysbpf.wait_for_programs()
        self._fill(generation, tables)
        sysbpf.update(self._maps["rules_active"], _index(0), struct.pack("<Q", version << 1 | generation))
        self.version = version
        return version

    def _fill(self, generation: int, tables: Tables) -> None:
        first_action, first_class = generation * (MOST_RULES + 1), generation * MOST_CLASSES
        *actions, default = tables.actions
        self._array("rule_actions", first_action, map(_action, actions))
        self._array("rule_actions", first_action + MOST_RULES, [_action(default)])
        self._array("rule_addresses", first_class, map(_sides, tables.address_classes))
        self._array("rule_ports", first_class, map(_sides, tables.port_classes))
        self._array("rule_sets", first_class, map(_bits, tables.sets))
        self._fill_ports(generation, tables.ports)
        self._prefixes[generation] = self._replace(
            "rule_prefixes",
            self._prefixes[generation],
            {
                struct.pack("<II", _GENERATION_BITS + length, generation) + prefix: number
                for prefix, length, number in tables.prefixes
            },
        )
        self._values[generation] = self._replace(
            "rule_values",
            self._values[generation],
            {
                struct.pack("<IIQ", generation, PROPERTIES.index(name), value): number
                for name, numbers in tables.values.items()
                for value, number in numbers.items()
            },
        )
        by_segment = any(tables.values[name] for name in ("interface", "state"))
        unnamed = (tables.unnamed[name] for name in PROPERTIES)
        self._array("rule_generations", generation, [struct.pack("<8I", len(actions), by_segment, *unnamed, 0)])

    def _array(self, name: str, first: int, values: Iterable[bytes]) -> None:
        for index, value in enumerate(values, first):
            sysbpf.update(self._maps[name], _index(index), value)

    def _fill_ports(self, generation: int, ports: NDArray[np.uint16]) -> None:
        groups = ports.reshape(-1, _PORT_GROUP)
        changed = (groups != self._ports[generation].reshape(-1, _PORT_GROUP)).any(axis=1)
        for group in np.flatnonzero(changed).tolist():
            index = _index(generation * len(groups) + group)
            sysbpf.update(self._maps["rule_port_classes"], index, groups[group].tobytes())
        self._ports[generation] = ports

    def _replace(self, name: str, old: Iterable[bytes], new: Mapping[bytes, int]) -> list[bytes]:
        """Delete the old keys that are not among the new ones, insert these, and return them."""
        for key in set(old) - new.keys():
            sysbpf.delete(self._maps[name], key)
        for key, number in new.items():
            sysbpf.update(self._maps[name], key, _index(number))
        return list(new)


def _index(number: int) -> bytes:
    return struct.pack("<I", number)


def _action(action: Action) -> bytes:
    """Pack struct rule_action; its arrays are by stream."""
    keep, sampled = [0, 0], [0, 0]
    keep[TRANSMITS.index], keep[RETRANSMITS.index] = action.transmit, action.retransmit
    sampled[TRANSMITS.index], sampled[RETRANSMITS.index] = True, action.sample_retransmits
    return struct.pack("<I5B3x", action.sample_rate, *keep, *sampled, action.sample_by_event)


def _bits(bits: RuleBits) -> bytes:
    return bits.to_bytes(_SET_BYTES, "little")


def _sides(sides: Sides) -> bytes:
    return _bits(sides.local) + _bits(sides.remote) + _bits(sides.either)
