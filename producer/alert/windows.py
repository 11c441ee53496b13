"""First stage, without I/O: sums of segments in windows of event time, of one partition of a topic of events.

Events are partitioned by flow and a rule may be by host, so a partition's sums are only a part of a group's. They are
absolute: who reads a partition again, from `position` and with the `watermark_ns` of that time, makes the same sums
of the windows that are still open, and none of the others.

A window is closed when the watermark has passed its end; an event of a closed window is late. The watermark is behind
the latest event by the lateness, which is how long an event may take to reach Kafka; where all that Kafka had at some
time has been read, behind that time.

Memory has a bound, since who writes to the topic chooses the groups and ids: where there is no room, an event of a new
group is not counted, and the oldest ids are forgotten. Both are told.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

AHEAD_NS = 3_600_000_000_000
"""An event's clock may be ahead of the reader's by as much: a window of the far future would stay open until then."""

ROOM_BYTES = 1 << 30
"""Memory for the groups and ids of all partitions of a member."""
MOST_SEGS = 1 << 62
"""A sum stays there: behind it, it would not fit into an alert."""
MOST_GROUP = 2048
"""Longest name of a group, in characters: a flow has that of a host, which has up to 1024, and two addresses."""

_NUMBER = 1 << 31
_ID_BYTES = 100
"""Of an id in a set, measured."""
_GROUP_BYTES = 200
"""Of a group in a window, beside its name."""

Record = Mapping[str, Any]


class View(NamedTuple):
    """What is summed: groups of a kind, in windows of a width. Rules that differ in their thresholds alone share it."""

    by: str
    width_ns: int


class Sums(NamedTuple):
    """The segments of groups in one window of a partition."""

    view: View
    start_ns: int
    segs: Mapping[str, int]


class Outcome(Enum):
    """What became of an event."""

    COUNTED = "counted"
    DUPLICATE = "duplicate"
    LATE = "late"
    """For one view at least."""
    AHEAD = "ahead"
    CROWDED = "crowded"
    """There is no room for its group, for one view at least."""


def flow(record: Record) -> str:
    """Return the name of an event's flow: the host, and the key of its message."""
    return f"{record['host']} {_end(record, 'saddr', 'sport')}>{_end(record, 'daddr', 'dport')}"


def _end(record: Record, address: str, port: str) -> str:
    text = record[address]
    return f"[{text}]:{record[port]}" if ":" in text else f"{text}:{record[port]}"


GROUPS: Mapping[str, Callable[[Record], str]] = {
    "host": lambda record: record["host"],
    "peer": lambda record: record["daddr"],
    "flow": flow,
    # A service has the lower port, nearly always.
    "port": lambda record: str(min(record["sport"], record["dport"])),
}
"""What is one group, and its name in an event's record."""


class _Window:
    """One open window: its sums, and where its first event stands."""

    __slots__ = ("first_offset", "segs", "size")

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.size = 0
        self.segs: dict[str, int] = {}


class _Ids:
    """The ids of the events that open windows may have, by their time, so that they can be forgotten; up to `most`."""

    def __init__(self, width_ns: int, most: int) -> None:
        self.forgotten = 0
        self._width_ns = width_ns
        self._most = most
        self._count = 0
        self._buckets: dict[int, set[int]] = {}

    def add(self, record: Record) -> bool:
        """Keep an event's id; False where it is there. A copy's time may differ: the clock was corrected meanwhile."""
        number = hash((record["boot_id"], record["cpu"], record["cpu_seq"]))
        if any(number in bucket for bucket in self._buckets.values()):
            return False
        if self._count >= self._most:
            self.forgotten += self._drop(min(self._buckets))
        self._buckets.setdefault(record["ts_ns"] // self._width_ns, set()).add(number)
        self._count += 1
        return True

    def forget(self, before_ns: int) -> None:
        for at in [at for at in self._buckets if (at + 2) * self._width_ns <= before_ns]:
            self._drop(at)

    def _drop(self, at: int) -> int:
        dropped = len(self._buckets.pop(at))
        self._count -= dropped
        return dropped


class SourceSums:
    """Sums one partition for some views, from offset `first` on, in about `room_bytes` of memory."""

    def __init__(
        self,
        views: Iterable[View],
        lateness_ns: int,
        first: int,
        watermark_ns: int = 0,
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        self._open: dict[View, dict[int, _Window]] = {view: {} for view in views}
        self._keys = [(view, GROUPS[view.by], windows) for view, windows in self._open.items()]
        self._lateness_ns = lateness_ns
        self._room = room_bytes // 2
        self._ids = _Ids(max(view.width_ns for view in self._open), max(1, room_bytes // 2 // _ID_BYTES))
        self.next = first
        """The offset to read next."""
        self.watermark_ns = watermark_ns
        """Windows that end by now are closed."""

    @property
    def position(self) -> int:
        """The offset to go on from after a restart: of the first event in a window that is not taken yet."""
        firsts = (window.first_offset for windows in self._open.values() for window in windows.values())
        return min(firsts, default=self.next)

    @property
    def ids_forgotten(self) -> int:
        """How many ids were forgotten while copies of their events could still come."""
        return self._ids.forgotten

    def add(self, record: Record, offset: int, now_ns: int) -> Outcome:
        """Count an event, a sampled one for all that it stands for; one that was counted before changes nothing.

        ValueError for numbers and names that no event has.
        """
        self.next = offset + 1
        ts_ns = record["ts_ns"]
        if ts_ns < 0 or not (0 <= record["segs"] < _NUMBER and 0 < record["sample_rate"] < _NUMBER):
            raise ValueError("no event has such numbers")
        if ts_ns > now_ns + AHEAD_NS:
            return Outcome.AHEAD
        places = [(name, windows, ts_ns - ts_ns % view.width_ns) for view, name, windows in self._keys
                  if ts_ns - ts_ns % view.width_ns + view.width_ns > self.watermark_ns]  # fmt: skip
        if not places:
            return Outcome.LATE
        groups = [name(record) for name, _, _ in places]
        if max(map(len, groups)) > MOST_GROUP:
            raise ValueError(f"a name of more than {MOST_GROUP} characters")
        if not self._ids.add(record):
            return Outcome.DUPLICATE
        segs = record["segs"] * record["sample_rate"]
        counted = [self._count(windows, start_ns, group, segs, offset)
                   for (_, windows, start_ns), group in zip(places, groups, strict=True)]  # fmt: skip
        self.watermark_ns = max(self.watermark_ns, min(ts_ns, now_ns) - self._lateness_ns)
        if not all(counted):
            return Outcome.CROWDED
        return Outcome.COUNTED if len(places) == len(self._keys) else Outcome.LATE

    def _count(self, windows: dict[int, _Window], start_ns: int, group: str, segs: int, offset: int) -> bool:
        """Add to a group's sum; False where the group is new and there is no room."""
        window = windows.get(start_ns)
        if window is None or group not in window.segs:
            size = _GROUP_BYTES + len(group)
            if self._room < size:
                return False
            self._room -= size
            window = windows.setdefault(start_ns, _Window(offset))
            window.size += size
        window.segs[group] = min(MOST_SEGS, window.segs.get(group, 0) + segs)
        return True

    def read_to_end(self, at_ns: int) -> None:
        """Note that all that Kafka had at that time has been read."""
        self.watermark_ns = max(self.watermark_ns, at_ns - self._lateness_ns)

    def take(self) -> list[Sums]:
        """Return the sums of the windows that are closed, and forget them."""
        taken = []
        for view, windows in self._open.items():
            for start_ns in sorted(start for start in windows if start + view.width_ns <= self.watermark_ns):
                window = windows.pop(start_ns)
                self._room += window.size
                taken.append(Sums(view, start_ns, window.segs))
        self._ids.forget(self.watermark_ns)
        return taken
