"""First stage, without I/O: sums of segments in windows of event time, for one partition of an event topic.

Events are partitioned by host or flow and a rule may be by peer, so a partition has only part of a group's sum. The
sums are absolute: a new owner that reads again from `position`, with the `watermark_ns` of that time, produces the same
sums of the windows that were still open, and none of the closed ones.

A window closes when the watermark passes its end; an event of a closed window is late. The watermark is behind the
latest event by the lateness (how long an event may take to reach Kafka), or, if all that Kafka had at some time has
been read, behind that time.

Memory is bounded, since writers of the topic choose the groups and ids: when it is full, events of new groups are not
counted, and the oldest ids are forgotten. Both are reported.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer.alert.event_ids import EventIds
from producer.consume.columns import Columns, Ints, groups
from producer.consume.plan import Fields
from producer.host.endpoints import endpoint

AHEAD_NS = 3_600_000_000_000
"""How far an event may be ahead of the reader's clock: its window stays open until then."""

MEMORY_BYTES = 1 << 30
"""Memory for the groups and ids of all partitions of a member."""
MOST_SEGS = 1 << 62
"""Sums saturate here, to fit into an alert."""
MOST_GROUP = 2048
"""Longest name of a group, in characters: a flow has a host name of up to 1024, and two addresses."""

_NUMBER = 1 << 31
_GROUP_BYTES = 200
"""Of a group in a window, without its name."""

Record = Mapping[str, Any]


class Grouping(NamedTuple):
    """A kind of group and a window width. Rules that differ only in their thresholds share one."""

    by: str
    width_ns: int


class Sums(NamedTuple):
    """Segments by group, in one window of a partition."""

    grouping: Grouping
    start_ns: int
    segs: Mapping[str, int]


class Outcome(IntEnum):
    """What became of an event."""

    COUNTED = 0
    DUPLICATE = 1
    LATE = 2
    """For at least one grouping."""
    AHEAD = 3
    CROWDED = 4
    """No memory for its group, for at least one grouping."""
    IMPOSSIBLE = 5
    """Its numbers or names are out of range."""


EVENT_FIELDS: Fields = (
    ("ts_ns", "long"),
    ("host", "string"),
    ("boot_id", "string"),
    ("cpu", "long"),
    ("cpu_seq", "long"),
    ("saddr", "string"),
    ("daddr", "string"),
    ("sport", "long"),
    ("dport", "long"),
    ("segs", "long"),
    ("sample_rate", "long"),
)
"""The fields that are counted and grouped by."""


def flow(record: Record) -> str:
    """Return the name of an event's flow: the host, the addresses and the ports."""
    source, destination = endpoint(record["saddr"], record["sport"]), endpoint(record["daddr"], record["dport"])
    return f"{record['host']} {source}>{destination}"


GROUPS: Mapping[str, Callable[[Record], str]] = {
    "host": lambda record: record["host"],
    "peer": lambda record: record["daddr"],
    "flow": flow,
    # The service nearly always has the lower port.
    "port": lambda record: str(min(record["sport"], record["dport"])),
}
"""The kinds of groups, and how to get the group's name from an event."""

_NAMED_BY: Mapping[str, tuple[str, ...]] = {
    "host": ("host",),
    "peer": ("daddr",),
    "flow": ("host", "saddr", "sport", "daddr", "dport"),
    "port": ("sport", "dport"),
}
"""The fields that a group's name consists of."""
_TEXTS = frozenset(name for name, kind in EVENT_FIELDS if kind == "string")
_NUMBERS_LENGTH = 20
"""Most characters of a group's name besides its texts."""


class _Window:
    """An open window: its sums, and the offset of its first event."""

    __slots__ = ("first_offset", "segs", "size")

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.size = 0
        self.segs: dict[str, int] = {}


class SourceSums:
    """Sums one partition by `groupings`, from offset `first`, in about `memory_bytes` of memory."""

    def __init__(
        self,
        groupings: Iterable[Grouping],
        lateness_ns: int,
        first: int,
        watermark_ns: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._open: dict[Grouping, dict[int, _Window]] = {grouping: {} for grouping in groupings}
        self._lateness_ns = lateness_ns
        self._free_bytes = memory_bytes // 2
        self._ids = EventIds(max(grouping.width_ns for grouping in self._open), memory_bytes // 2)
        self.next = first
        """The offset to read next."""
        self.watermark_ns = watermark_ns
        """Windows that end at or before this are closed."""

    @property
    def position(self) -> int:
        """The offset to resume from: the first event of a window that has not been taken."""
        firsts = (window.first_offset for windows in self._open.values() for window in windows.values())
        return min(firsts, default=self.next)

    @property
    def ids_forgotten(self) -> int:
        """Ids that were forgotten while duplicates of their events could still arrive."""
        return self._ids.forgotten

    def add(self, events: Columns, offsets: Ints, now_ns: int) -> NDArray[np.uint8]:
        """Count events, multiplied by their sample rate, and return their outcomes; duplicates are not counted."""
        if not len(events):
            return np.empty(0, np.uint8)
        self.next = int(offsets[-1]) + 1
        ts_ns = events["ts_ns"]
        outcomes = np.full(len(events), Outcome.COUNTED, np.uint8)
        outcomes[ts_ns > now_ns + AHEAD_NS] = Outcome.AHEAD
        outcomes[~self._possible(events)] = Outcome.IMPOSSIBLE
        usable = outcomes == Outcome.COUNTED
        # Late events and duplicates may advance it too: not beyond what their originals did, or their windows.
        reached = np.where(usable, np.minimum(ts_ns, now_ns) - self._lateness_ns, 0)
        watermarks = np.maximum.accumulate(np.append(self.watermark_ns, reached))
        opened = [
            usable & (ts_ns - ts_ns % grouping.width_ns + grouping.width_ns > watermarks[:-1])
            for grouping in self._open
        ]
        in_any, in_all = np.logical_or.reduce(opened), np.logical_and.reduce(opened)
        outcomes[usable & ~in_all] = Outcome.LATE
        is_counted = self._are_new(events, in_any)
        outcomes[in_any & ~is_counted] = Outcome.DUPLICATE
        for (grouping, windows), is_open in zip(self._open.items(), opened, strict=True):
            rows = np.flatnonzero(is_open & is_counted)
            crowded = self._count(grouping, windows, events.select(rows), offsets[rows])
            outcomes[rows[crowded]] = Outcome.CROWDED
        self.watermark_ns = int(watermarks[-1])
        return outcomes

    def _possible(self, events: Columns) -> NDArray[np.bool_]:
        """Return which events have possible numbers and names."""
        segs, rate = events["segs"], events["sample_rate"]
        possible: NDArray[np.bool_] = (
            (events["ts_ns"] >= 0) & (segs >= 0) & (segs < _NUMBER) & (rate > 0) & (rate < _NUMBER)
        )
        lengths = np.array(list(map(len, events.texts)), np.int64)
        if len(_TEXTS) * lengths.max(initial=0) + _NUMBERS_LENGTH > MOST_GROUP:
            for grouping in self._open:
                names = [name for name in _NAMED_BY[grouping.by] if name in _TEXTS]
                total = sum((lengths[events[name]] for name in names), np.zeros(len(events), np.int64))
                possible &= total + (_NUMBERS_LENGTH if grouping.by == "flow" else 0) <= MOST_GROUP
        return possible

    def _are_new(self, events: Columns, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which of the chosen events are no duplicates."""
        found = events if chosen.all() else events.select(chosen)
        is_new = np.zeros(len(events), np.bool_)
        if len(found):
            boots = found.hashes[found["boot_id"]]
            is_new[chosen] = self._ids.add(boots, found["cpu"], found["cpu_seq"], found["ts_ns"])
        return is_new

    def _count(
        self, grouping: Grouping, windows: dict[int, _Window], events: Columns, offsets: Ints
    ) -> NDArray[np.bool_]:
        """Add to the sums of groups; return which events are of a group that is new while memory is full."""
        starts = events["ts_ns"] // grouping.width_ns * grouping.width_ns
        named_by = _NAMED_BY[grouping.by]
        numbers, firsts = groups(starts, *(events[name] for name in named_by))
        segs = _summed(numbers, events["segs"] * events["sample_rate"])
        names = _names(grouping.by, events.select(firsts))
        crowded = np.zeros(len(firsts), np.bool_)
        for number, (start_ns, offset, name) in enumerate(
            zip(starts[firsts].tolist(), offsets[firsts].tolist(), names, strict=True)
        ):
            crowded[number] = not self._add(windows, start_ns, name, segs[number], offset)
        return crowded[numbers]

    def _add(self, windows: dict[int, _Window], start_ns: int, group: str, segs: int, offset: int) -> bool:
        """Add to a group's sum; return False if the group is new and memory is full."""
        window = windows.get(start_ns)
        if window is None or group not in window.segs:
            size = _GROUP_BYTES + sys.getsizeof(group)
            if self._free_bytes < size:
                return False
            self._free_bytes -= size
            window = windows.setdefault(start_ns, _Window(offset))
            window.size += size
        window.segs[group] = min(MOST_SEGS, window.segs.get(group, 0) + segs)
        return True

    def read_to_end(self, at_ns: int) -> None:
        """Record that everything that Kafka had at `at_ns` has been read."""
        self.watermark_ns = max(self.watermark_ns, at_ns - self._lateness_ns)

    def take(self) -> list[Sums]:
        """Remove and return the sums of closed windows."""
        taken = []
        for grouping, windows in self._open.items():
            for start_ns in sorted(start for start in windows if start + grouping.width_ns <= self.watermark_ns):
                window = windows.pop(start_ns)
                self._free_bytes += window.size
                taken.append(Sums(grouping, start_ns, window.segs))
        self._ids.forget(self.watermark_ns)
        return taken


def _names(by: str, events: Columns) -> list[str]:
    """Return the name of each event's group."""
    named_by = _NAMED_BY[by]
    columns = [
        [events.texts[index] for index in events[name].tolist()] if name in _TEXTS else events[name].tolist()
        for name in named_by
    ]
    return [GROUPS[by](dict(zip(named_by, values, strict=True))) for values in zip(*columns, strict=True)]


def _summed(numbers: Ints, segs: Ints) -> list[int]:
    """Return the sum of each number's segments, exactly: a sum may have more than 64 bits."""
    # bincount() adds doubles, exact up to 2^53: the halves of a batch's numbers are far below.
    high, low = (np.bincount(numbers, part).astype(np.int64).tolist() for part in (segs >> 31, segs & _NUMBER - 1))
    return [(above << 31) + below for above, below in zip(high, low, strict=True)]
