"""The core of alerting, without I/O: sums in windows of event time, and what they say of a rule's threshold.

Two steps, since events are partitioned by flow and a rule may be by host. `PartitionSums` sums one partition of one
topic. A reader that takes over goes on from `position`, with the `closed_before_ns` of that time (both fit in a
committed offset and its metadata), and makes the sums that are left, as the first would have. `RuleState` decides over
the sums of all partitions of a window, window after window.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from producer.errors import ConfigError

GROUPS = ("host", "peer", "flow", "port")
MEASURES = ("count", "ratio")
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When to alert: a measure of a group of segments, in a window, against a threshold."""

    name: str
    by: str
    """What is one group: a host, a peer's address, a flow, or a port (of both ends the lower)."""
    measure: str
    """count: retransmitted segments; ratio: those of all transmitted ones."""
    window_s: int
    threshold: float
    """Fires at this value and above."""
    clear: float
    """Resolves below this value; between it and the threshold nothing changes."""
    minimum: int = 1
    """Fewer segments transmitted (count: retransmitted) in a window than this do not fire."""
    lateness_s: int = 10
    """How far behind the latest event of its partition an event may come."""

    def __post_init__(self) -> None:
        for value, known in ((self.by, GROUPS), (self.measure, MEASURES)):
            if value not in known:
                raise ConfigError(f"alerts.{self.name}: {value!r} is none of {', '.join(known)}")
        if self.window_s < 1 or self.lateness_s < 0 or self.minimum < 0:
            raise ConfigError(f"alerts.{self.name}: window_s is at least 1, lateness_s and minimum at least 0")
        if not 0 < self.clear <= self.threshold:
            raise ConfigError(f"alerts.{self.name}: clear is above 0, and at most the threshold")


class Segments(NamedTuple):
    """What of an event counts."""

    id: tuple[str, int, int]
    ts_ns: int
    segs: int
    groups: Mapping[str, str]


class Sum(NamedTuple):
    """The segments of one group in one window of one partition."""

    rule: str
    start_ns: int
    group: str
    segs: int


class Alert(NamedTuple):
    """A change: a group fires, or is resolved."""

    rule: str
    group: str
    start_ns: int
    firing: bool
    value: float


def segments(record: Mapping[str, Any]) -> Segments:
    """Return what counts of a record of either topic; a sampled one stands for `sample_rate`."""
    flow = f"{record['host']} {record['netns']} {record['saddr']}:{record['sport']}>{record['daddr']}:{record['dport']}"
    groups = {
        "host": record["host"],
        "peer": record["daddr"],
        "flow": flow,
        "port": str(min(record["sport"], record["dport"])),
    }
    identity = record["boot_id"], record["cpu"], record["cpu_seq"]
    return Segments(identity, record["ts_ns"], record["segs"] * record["sample_rate"], groups)


class _Window:
    """One open window: its sums, the ids that are in them, and where its first event stands."""

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.ids: set[tuple[str, int, int]] = set()
        self.sums: dict[str, int] = {}


class PartitionSums:
    """Sums one partition for one rule; `late` counts events that came when their window was closed."""

    def __init__(self, rule: AlertRule, closed_before_ns: int = 0) -> None:
        self._closed_before_ns = closed_before_ns
        self._rule = rule
        self._width_ns = rule.window_s * _SECOND_NS
        self._open: dict[int, _Window] = {}
        self._latest_ns = 0
        self._next_offset = 0
        self.late = 0

    @property
    def closed_before_ns(self) -> int:
        """Windows that begin before this take nothing more."""
        reached_ns = self._latest_ns - self._rule.lateness_s * _SECOND_NS
        return max(self._closed_before_ns, reached_ns - reached_ns % self._width_ns)

    @property
    def position(self) -> int:
        """The offset to go on from after a restart: of the first event in a window that is not taken yet."""
        return min((window.first_offset for window in self._open.values()), default=self._next_offset)

    def add(self, event: Segments, offset: int) -> None:
        """Count an event; one whose id the window has already changes nothing."""
        self._next_offset = offset + 1
        start_ns = event.ts_ns - event.ts_ns % self._width_ns
        if start_ns < self.closed_before_ns:
            self.late += 1
            return
        self._latest_ns = max(self._latest_ns, event.ts_ns)
        window = self._open.setdefault(start_ns, _Window(offset))
        if event.id not in window.ids:
            window.ids.add(event.id)
            group = event.groups[self._rule.by]
            window.sums[group] = window.sums.get(group, 0) + event.segs

    def take(self) -> Iterator[Sum]:
        """Yield the sums of the windows that are closed, the oldest first, and forget them."""
        for start_ns in sorted(start_ns for start_ns in self._open if start_ns < self.closed_before_ns):
            for group, segs in sorted(self._open[start_ns].sums.items()):
                yield Sum(self._rule.name, start_ns, group, segs)
            del self._open[start_ns]


class RuleState:
    """Which groups of a rule fire."""

    def __init__(self, rule: AlertRule) -> None:
        self._rule = rule
        self.firing: set[str] = set()

    def close(self, start_ns: int, retransmitted: Mapping[str, int], transmitted: Mapping[str, int]) -> list[Alert]:
        """Decide over a window's sums of all partitions, windows in order; return what changes.

        A group that fires and has no segments in the window is resolved.
        """
        changes = []
        for group in sorted({*self.firing, *retransmitted}):
            again, total = retransmitted.get(group, 0), transmitted.get(group, 0)
            is_ratio = self._rule.measure == "ratio"
            # No more than all: the two topics may differ at a window's edge.
            value = min(1.0, again / max(total, 1)) if is_ratio else float(again)
            is_enough = (total if is_ratio else again) >= self._rule.minimum
            if group not in self.firing and is_enough and value >= self._rule.threshold:
                self.firing.add(group)
                changes.append(Alert(self._rule.name, group, start_ns, True, value))
            elif group in self.firing and value < self._rule.clear:
                self.firing.remove(group)
                changes.append(Alert(self._rule.name, group, start_ns, False, value))
        return changes
