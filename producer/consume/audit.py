"""Audits a topic by host and boot: events, duplicates, gaps, and the order within each flow.

Memory: one bit per event number (gaps.py), the counters, and the last time of the most recent flows. Each is bounded,
since writers of the topic choose hosts and numbers: events beyond the bounds are counted as unchecked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from producer.consume.gaps import MOST_PAGES, Gaps, Numbers, find_gaps

ALL = 0
"""`complete_from_ms` of a topic without deleted messages."""
MOST_BOOTS = 100_000
_FLOWS = 1 << 19
_NEVER = (1 << 63) - 1


class Row(NamedTuple):
    """The audited fields of a message."""

    partition: int
    key: bytes | None
    timestamp_ms: int
    """The message's timestamp: when it was sent, however old the event was."""
    ts_ns: int
    host: str
    boot_id: str
    cpu: int
    cpu_seq: int


@dataclass(frozen=True, slots=True)
class BootReport:
    """The audit of one boot of a host."""

    host: str
    boot_id: str
    first_ns: int
    last_ns: int
    events: int
    """Distinct events, without duplicates."""
    duplicates: int
    gaps: int
    missing: int
    perhaps_deleted: int
    """Missing numbers that the topic's retention may have deleted."""
    restarts: int
    """Starts after a crash without pinned rings: before each, an unknown number of events was lost."""
    out_of_order: int
    """Events after a later one of their flow."""
    first_numbers: dict[int, int]
    """By CPU, if not 1: earlier events were deleted, or were never in this topic."""


@dataclass(slots=True)
class _Boot:
    host: str
    boot_id: str
    counters: dict[int, "_Counter"] = field(default_factory=dict)
    first_ns: int = _NEVER
    last_ns: int = -_NEVER
    events: int = 0
    duplicates: int = 0
    out_of_order: int = 0


@dataclass(slots=True)
class _Counter:
    index: int
    boot: _Boot
    complete_from: int


class _Order:
    """The last time of each flow. With many flows, the least recently active are forgotten."""

    def __init__(self, limit: int) -> None:
        self.forgotten = 0
        self._limit = limit
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def is_late(self, flow: int, ts_ns: int) -> bool:
        """Record an event; return whether its flow had a later one."""
        last = self._young.get(flow)
        if last is None:
            last = self._old.get(flow, -_NEVER)
            if len(self._young) >= self._limit:
                self.forgotten += len(self._old.keys() - self._young.keys())
                self._old, self._young = self._young, {}
        self._young[flow] = max(last, ts_ns)
        return ts_ns < last


class Audit:
    """Audits the messages of one topic, given in each partition's order.

    Nothing sent after `complete_from_ms` has been deleted from the topic.
    """

    def __init__(
        self, complete_from_ms: float = ALL, flows: int = _FLOWS, boots: int = MOST_BOOTS, pages: int = MOST_PAGES
    ) -> None:
        self.unchecked = 0
        """Events beyond the limits on boots or on memory for numbers."""
        self._complete_from_ms = complete_from_ms
        self._most_boots = boots
        self._numbers = Numbers(pages)
        self._order = _Order(flows)
        self._boots: dict[tuple[str, str], _Boot] = {}
        self._counters: list[_Counter] = []

    @property
    def flows_forgotten(self) -> int:
        """Number of flows that were forgotten, and would count as new."""
        return self._order.forgotten

    def add(self, rows: Sequence[Row]) -> None:
        """Audit messages."""
        found = [(row, counter) for row in rows if (counter := self._counter(row)) is not None]
        self.unchecked += len(rows) - len(found)
        if not found:
            return
        rows, counters = [row for row, _ in found], [counter for _, counter in found]
        new = self._numbers.add([each.index for each in counters], [row.cpu_seq for row in rows])
        for row, counter, is_new in zip(rows, counters, new.tolist(), strict=True):
            boot = counter.boot
            if not is_new:
                boot.duplicates += 1
                continue
            boot.events += 1
            boot.first_ns = min(boot.first_ns, row.ts_ns)
            boot.last_ns = max(boot.last_ns, row.ts_ns)
            if row.timestamp_ms > self._complete_from_ms and row.cpu_seq < counter.complete_from:
                counter.complete_from = row.cpu_seq
            # Hosts may have the same private addresses, and so the same keys.
            if self._order.is_late(hash((row.partition, row.key, row.host, row.boot_id)), row.ts_ns):
                boot.out_of_order += 1

    def boots(self) -> Iterator[BootReport]:
        """Yield the reports, by host and then by the boots' first event."""
        gaps = {
            counter: find_gaps(pieces, self._counters[counter].complete_from)
            for counter, pieces in self._numbers.held()
        }
        for boot in sorted(self._boots.values(), key=lambda boot: (boot.host, boot.first_ns)):
            yield _report(boot, {cpu: gaps[counter.index] for cpu, counter in sorted(boot.counters.items())})

    def _counter(self, row: Row) -> _Counter | None:
        """Return a row's counter; None if a limit does not allow it or its number."""
        boot = self._boots.get((row.host, row.boot_id))
        if boot is None and len(self._boots) >= self._most_boots:
            return None
        counter = boot.counters.get(row.cpu) if boot is not None else None
        index = len(self._counters) if counter is None else counter.index
        if not self._numbers.reserve(index, row.cpu_seq):
            return None
        if boot is None:
            boot = self._boots[row.host, row.boot_id] = _Boot(row.host, row.boot_id)
        if counter is None:
            complete_from = ALL if self._complete_from_ms == ALL else _NEVER
            counter = boot.counters[row.cpu] = _Counter(index, boot, complete_from)
            self._counters.append(counter)
        return counter


def _report(boot: _Boot, gaps: dict[int, Gaps]) -> BootReport:
    return BootReport(
        boot.host,
        boot.boot_id,
        boot.first_ns,
        boot.last_ns,
        boot.events,
        boot.duplicates,
        gaps=sum(each.gaps for each in gaps.values()),
        missing=sum(each.missing for each in gaps.values()),
        perhaps_deleted=sum(each.unsure for each in gaps.values()),
        # All CPUs enter a generation together.
        restarts=len(frozenset[int]().union(*(each.generations for each in gaps.values()))),
        out_of_order=boot.out_of_order,
        first_numbers={cpu: each.first for cpu, each in gaps.items() if each.first != 1},
    )
