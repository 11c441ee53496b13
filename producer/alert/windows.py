"""A rule's sums in windows of event time, by group, without I/O.

Each group has the causes and the worst flows of its sum. Memory is bounded, since writers of the topics choose the
groups: when it is full, records of new groups are not counted, and new flows not listed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from producer.alert.measure import FLOW, Measured, Selection, flow_names, measured
from producer.config.alerts import AlertRule
from producer.connections import Growth, row_hashes
from producer.consume.columns import Columns, groups
from producer.events import Ints, Mask

MOST_SEGS = 1 << 62
"""Sums saturate here, to fit into an alert."""
MOST_GROUP = 2048
"""Longest name of a group, in characters: a flow has a host name of up to 1024, and two addresses."""
MOST_GROUPS, MOST_FLOWS, MOST_SAMPLES = 500_000, 1_000_000, 1 << 25
"""In open windows, of all rules: about 1 GiB in all. Samples are round-trip times."""
_FLOWS_KEPT, _FLOWS_MOST = 64, 128
"""Flows of a group: at the second number, all but the first are dropped."""


class Room:
    """How much more the windows of all rules may take."""

    def __init__(self, group_count: int = MOST_GROUPS, flows: int = MOST_FLOWS, samples: int = MOST_SAMPLES) -> None:
        self.groups, self.flows, self.samples = group_count, flows, samples


@dataclass(slots=True)
class Group:
    """The sums of a group in a window."""

    name: str
    total: int = 0
    """Segments sent, connects that failed, or measured round-trip times."""
    causes: Counter[str] = field(default_factory=Counter)
    flows: dict[str, int] = field(default_factory=dict)
    samples: list[Ints] = field(default_factory=list)

    @property
    def part(self) -> int:
        """Retransmitted segments, or connects that failed."""
        return min(MOST_SEGS, self.causes.total())

    def quantile_s(self, quantile: float) -> float:
        """Return the quantile of the round-trip times in seconds, interpolated."""
        return float(np.quantile(np.concatenate(self.samples), quantile)) / 1e6 if self.samples else 0.0


class Added(NamedTuple):
    """Which records were late, and which had no room."""

    late: Mask
    crowded: Mask


class Windows:
    """The open windows of a rule: by start, by a hash of the group."""

    def __init__(self, rule: AlertRule, room: Room) -> None:
        self.rule = rule
        self.width_ns = round(rule.window_s * 1e9)
        self._selection = Selection(rule)
        self._room = room
        self._open: dict[int, dict[int, Group]] = {}
        self._is_srtt = rule.measure == "srtt"

    def starts(self) -> list[int]:
        """Return the starts of the windows, ascending."""
        return sorted(self._open)

    def take(self, start_ns: int) -> dict[str, Group]:
        """Remove and return a window's groups by name."""
        window = self._open.pop(start_ns, {})
        self._room.groups += sum(_cost(group.name) for group in window.values())
        self._room.flows += sum(sum(map(_cost, group.flows)) for group in window.values())
        self._room.samples += sum(len(part) for group in window.values() for part in group.samples)
        return {group.name: group for group in window.values()}

    def add(self, records: Columns, growth: Growth | None, decided_ns: int) -> Added:
        """Count records; those of windows that end at or before `decided_ns` are late."""
        found = measured(self.rule, records, growth)
        starts = records["ts_ns"] // self.width_ns * self.width_ns
        chosen = self._selection.chosen(records)
        late = chosen & (starts + self.width_ns <= decided_ns)
        crowded = np.zeros(len(records), np.bool_)
        counts = found.totals > 0
        counts[found.rows] = True
        rows = np.flatnonzero(chosen & ~late & counts)
        if len(rows):
            self._count(records, found, starts, rows, crowded)
        return Added(late & counts, crowded)

    def _count(self, records: Columns, found: Measured, starts: Ints, rows: Ints, crowded: Mask) -> None:
        columns = [column[rows] for column in self._selection.columns(records)]
        ids, firsts = groups(starts[rows], *columns)
        keys = row_hashes(columns)[firsts].tolist()
        held = self._groups(records, starts[rows][firsts].tolist(), keys, rows[firsts])
        group_of_row = np.full(len(records), -1, np.int64)
        group_of_row[rows] = ids
        crowded[rows] = np.array([group is None for group in held])[ids]
        for group, total in zip(held, _summed(ids, found.totals[rows], len(held)), strict=True):
            if group is not None:
                group.total = min(MOST_SEGS, group.total + total)
        parts = np.flatnonzero(group_of_row[found.rows] >= 0)
        if len(parts):
            self._count_parts(records, found, parts, group_of_row[found.rows[parts]], held)

    def _groups(self, records: Columns, starts: list[int], keys: list[int], rows: Ints) -> list[Group | None]:
        """Return each group; None for new ones that there is no room for."""
        none: dict[int, Group] = {}
        held = [self._open.get(start, none).get(key) for start, key in zip(starts, keys, strict=True)]
        new = [at for at, group in enumerate(held) if group is None][: max(0, self._room.groups)]
        for at, name in zip(new, self._selection.names(records, rows[new]), strict=True):
            if _cost(name) <= self._room.groups:
                held[at] = self._open.setdefault(starts[at], {})[keys[at]] = Group(name)
                self._room.groups -= _cost(name)
        return held

    def _count_parts(
        self, records: Columns, found: Measured, parts: Ints, ids: Ints, held: Sequence[Group | None]
    ) -> None:
        weights = found.weights[parts]
        if self._is_srtt:
            for at, samples in _split(ids, weights):
                group = held[at]
                if group is not None and len(samples) <= self._room.samples:
                    self._room.samples -= len(samples)
                    group.samples.append(samples)
            slow = weights >= self.rule.clear * 1e6
            parts, ids, weights = parts[slow], ids[slow], weights[slow]
        else:
            pairs, firsts = groups(ids, found.parts[parts])
            causes = found.parts[parts][firsts].tolist()
            for at, cause, weight in zip(
                ids[firsts].tolist(), causes, _summed(pairs, weights, len(firsts)), strict=True
            ):
                group = held[at]
                if group is not None:
                    group.causes[found.causes[cause]] += weight
        self._list_flows(records, found.rows[parts], ids, weights, held)

    def _list_flows(self, records: Columns, rows: Ints, ids: Ints, weights: Ints, held: Sequence[Group | None]) -> None:
        if not len(rows):
            return
        pairs, firsts = groups(ids, *(records[name][rows] for name in FLOW))
        if self._is_srtt:
            most = np.zeros(len(firsts), np.int64)
            np.maximum.at(most, pairs, weights)
            sums = most.tolist()
        else:
            sums = _summed(pairs, weights, len(firsts))
        for at, name, weight in zip(ids[firsts].tolist(), flow_names(records, rows[firsts]), sums, strict=True):
            group = held[at]
            if group is None:
                continue
            before = group.flows.get(name)
            if before is None:
                if self._room.flows < _cost(name):
                    continue
                self._room.flows -= _cost(name)
                group.flows[name] = weight
                if len(group.flows) > _FLOWS_MOST:
                    self._prune(group)
            else:
                group.flows[name] = max(before, weight) if self._is_srtt else before + weight

    def _prune(self, group: Group) -> None:
        kept = sorted(group.flows.items(), key=lambda flow: -flow[1])[:_FLOWS_KEPT]
        self._room.flows += sum(map(_cost, group.flows)) - sum(_cost(name) for name, _ in kept)
        group.flows = dict(kept)


def _cost(name: str) -> int:
    """Return the room that a name takes: 1 for usual ones."""
    return 1 + len(name) // 128


def _split(ids: Ints, values: Ints) -> list[tuple[int, Ints]]:
    """Return the values of each id."""
    order = np.argsort(ids, kind="stable")
    found, heads = np.unique(ids[order], return_index=True)
    return list(zip(found.tolist(), np.split(values[order], heads[1:]), strict=True))


def _summed(numbers: Ints, values: Ints, count: int) -> list[int]:
    """Return the sum of each number's values, exactly: a sum may have more than 64 bits."""
    # bincount() adds doubles, exact up to 2^53: a batch has far fewer than 2^22 records.
    total = [0] * count
    for shift in (0, 31):
        part = values >> shift & (1 << 31) - 1
        sums = np.bincount(numbers, part, count).astype(np.int64).tolist()
        total = [before + (each << shift) for before, each in zip(total, sums, strict=True)]
    return total
