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

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

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
_ID_BYTES = 100
"""Measured, of an id in a set."""
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


class Outcome(Enum):
    """What became of an event."""

    COUNTED = "counted"
    DUPLICATE = "duplicate"
    LATE = "late"
    """For at least one grouping."""
    AHEAD = "ahead"
    CROWDED = "crowded"
    """No memory for its group, for at least one grouping."""


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


class _Window:
    """An open window: its sums, and the offset of its first event."""

    __slots__ = ("first_offset", "segs", "size")

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.size = 0
        self.segs: dict[str, int] = {}


class _Ids:
    """Event ids of open windows, at most `most`, in buckets by time so that old ones can be dropped."""

    def __init__(self, width_ns: int, most: int) -> None:
        self.forgotten = 0
        self._width_ns = width_ns
        self._most = most
        self._count = 0
        self._buckets: dict[int, set[int]] = {}

    def add(self, record: Record) -> bool:
        """Add an event's id; return False if present. A duplicate's time may differ after a clock correction."""
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
        self._keys = [(grouping, GROUPS[grouping.by], windows) for grouping, windows in self._open.items()]
        self._lateness_ns = lateness_ns
        self._free_bytes = memory_bytes // 2
        self._ids = _Ids(max(grouping.width_ns for grouping in self._open), max(1, memory_bytes // 2 // _ID_BYTES))
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

    def add(self, record: Record, offset: int, now_ns: int) -> Outcome:
        """Count an event, multiplied by its sample rate; duplicates are not counted.

        Raises ValueError for impossible numbers and names.
        """
        self.next = offset + 1
        ts_ns = record["ts_ns"]
        if ts_ns < 0 or not (0 <= record["segs"] < _NUMBER and 0 < record["sample_rate"] < _NUMBER):
            raise ValueError("numbers out of range")
        if ts_ns > now_ns + AHEAD_NS:
            return Outcome.AHEAD
        windows_of_event = [(name, windows, ts_ns - ts_ns % grouping.width_ns) for grouping, name, windows in self._keys
                  if ts_ns - ts_ns % grouping.width_ns + grouping.width_ns > self.watermark_ns]  # fmt: skip
        if not windows_of_event:
            return Outcome.LATE
        groups = [name(record) for name, _, _ in windows_of_event]
        if max(map(len, groups)) > MOST_GROUP:
            raise ValueError(f"a name is longer than {MOST_GROUP} characters")
        if not self._ids.add(record):
            return Outcome.DUPLICATE
        segs = record["segs"] * record["sample_rate"]
        counted = [self._count(windows, start_ns, group, segs, offset)
                   for (_, windows, start_ns), group in zip(windows_of_event, groups, strict=True)]  # fmt: skip
        self.watermark_ns = max(self.watermark_ns, min(ts_ns, now_ns) - self._lateness_ns)
        if not all(counted):
            return Outcome.CROWDED
        return Outcome.COUNTED if len(windows_of_event) == len(self._keys) else Outcome.LATE

    def _count(self, windows: dict[int, _Window], start_ns: int, group: str, segs: int, offset: int) -> bool:
        """Add to a group's sum; return False if the group is new and memory is full."""
        window = windows.get(start_ns)
        if window is None or group not in window.segs:
            size = _GROUP_BYTES + len(group)
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
