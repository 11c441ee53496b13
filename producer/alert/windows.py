"""First stage, without I/O: sums of segments in windows of event time, of one partition of a topic of events.

Events are partitioned by flow and a rule may be by host, so a partition's sums are only a part of a group's. They are
absolute: who reads a partition again, from `position` and with the `watermark_ns` of that time, makes the same sums
of the windows that are still open, and none of the others.

A window is closed when the watermark has passed its end; an event of a closed window is late. The watermark is behind
the latest event by the lateness, which is how long an event may take to reach Kafka; where all that Kafka had at some
time has been read, behind that time.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

_AHEAD_NS = 3_600_000_000_000
"""An event's clock may be ahead of the reader's by as much: a window of the far future would stay open until then."""

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

    __slots__ = ("first_offset", "segs")

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.segs: dict[str, int] = {}


class _Ids:
    """The ids of the events that open windows may have, by their time, so that they can be forgotten."""

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._buckets: dict[int, dict[tuple[str, int], set[int]]] = {}

    def add(self, record: Record) -> bool:
        """Keep an event's id; False where it is there. A copy's time may differ: the clock was corrected meanwhile."""
        source, number = (record["boot_id"], record["cpu"]), record["cpu_seq"]
        for bucket in self._buckets.values():
            if source in bucket and number in bucket[source]:
                return False
        at = record["ts_ns"] // self._width_ns
        self._buckets.setdefault(at, {}).setdefault(source, set()).add(number)
        return True

    def forget(self, before_ns: int) -> None:
        for at in [at for at in self._buckets if (at + 2) * self._width_ns <= before_ns]:
            del self._buckets[at]


class SourceSums:
    """Sums one partition for some views, from offset `first` on."""

    def __init__(self, views: Iterable[View], lateness_ns: int, first: int, watermark_ns: int = 0) -> None:
        self._open: dict[View, dict[int, _Window]] = {view: {} for view in views}
        self._keys = [(view, GROUPS[view.by], windows) for view, windows in self._open.items()]
        self._lateness_ns = lateness_ns
        self._ids = _Ids(max(view.width_ns for view in self._open))
        self.next = first
        """The offset to read next."""
        self.watermark_ns = watermark_ns
        """Windows that end by now are closed."""

    @property
    def position(self) -> int:
        """The offset to go on from after a restart: of the first event in a window that is not taken yet."""
        firsts = (window.first_offset for windows in self._open.values() for window in windows.values())
        return min(firsts, default=self.next)

    def add(self, record: Record, offset: int, now_ns: int) -> Outcome:
        """Count an event, a sampled one for all that it stands for; one that was counted before changes nothing."""
        self.next = offset + 1
        ts_ns = record["ts_ns"]
        if ts_ns > now_ns + _AHEAD_NS:
            return Outcome.AHEAD
        places = [(name, windows, ts_ns - ts_ns % view.width_ns) for view, name, windows in self._keys
                  if ts_ns - ts_ns % view.width_ns + view.width_ns > self.watermark_ns]  # fmt: skip
        if not places:
            return Outcome.LATE
        if not self._ids.add(record):
            return Outcome.DUPLICATE
        segs = record["segs"] * record["sample_rate"]
        for name, windows, start_ns in places:
            if start_ns not in windows:
                windows[start_ns] = _Window(offset)
            sums, group = windows[start_ns].segs, name(record)
            sums[group] = sums.get(group, 0) + segs
        self.watermark_ns = max(self.watermark_ns, min(ts_ns, now_ns) - self._lateness_ns)
        return Outcome.COUNTED if len(places) == len(self._keys) else Outcome.LATE

    def read_to_end(self, at_ns: int) -> None:
        """Note that all that Kafka had at that time has been read."""
        self.watermark_ns = max(self.watermark_ns, at_ns - self._lateness_ns)

    def take(self) -> list[Sums]:
        """Return the sums of the windows that are closed, and forget them."""
        taken = []
        for view, windows in self._open.items():
            for start_ns in sorted(start for start in windows if start + view.width_ns <= self.watermark_ns):
                taken.append(Sums(view, start_ns, windows.pop(start_ns).segs))
        self._ids.forget(self.watermark_ns)
        return taken
