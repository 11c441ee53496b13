"""Audits a topic by host and boot: events, duplicates, gaps, and the order within each flow.

Memory: one bit per event number (gaps.py), the counters, and the last time of the most recent flows. Each is bounded,
since writers of the topic choose hosts and numbers: events beyond the bounds are counted as unchecked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from producer.connections import row_hashes
from producer.consume.columns import Columns, groups
from producer.consume.gaps import MOST_PAGES, Gaps, Numbers, find_gaps, page_of
from producer.events import Ints, Mask

ALL = 0
"""`complete_from_ms` of a topic without deleted messages."""
MOST_BOOTS = 100_000
_FLOWS = 1 << 19
_NEVER = (1 << 63) - 1
_SPREAD = 0x1E3779B97F4A7C15
"""Odd, to spread partition numbers over the hashes of flows."""


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

    def late(self, flows: Ints, firsts: Ints, hashes: Ints, ts_ns: Ints) -> Mask:
        """Record events; return which had a later one of their flow before.

        `flows` numbers the flows from 0 by their first events, `firsts`; `hashes` tells them from those of other calls.
        """
        last = np.array([self._last(number) for number in hashes[firsts].tolist()], np.int64)
        order = np.argsort(flows, kind="stable")
        flow, ts = flows[order], ts_ns[order]
        # The latest time before each event of its flow, as a running maximum of (flow, rank of the time).
        times, ranks = np.unique(np.concatenate([last, ts]), return_inverse=True)
        steps = flow * len(times) + ranks[len(last) :]
        starts = np.flatnonzero(np.diff(flow, prepend=-1))
        before = np.empty_like(steps)
        before[1:] = steps[:-1]
        before[starts] = np.arange(len(last)) * len(times) + ranks[: len(last)]
        latest = np.maximum.accumulate(before)
        late = np.empty(len(ts), np.bool_)
        late[order] = steps < latest
        ends = np.append(starts[1:], len(ts)) - 1
        for number, at in zip(
            hashes[firsts].tolist(), times[np.maximum(latest, steps)[ends] % len(times)].tolist(), strict=True
        ):
            if number in self._young:
                self._young[number] = at
            elif number in self._old:
                self._old[number] = at
        return late

    def _last(self, flow: int) -> int:
        """Return a flow's last time, and make the flow young."""
        last = self._young.get(flow)
        if last is None:
            last = self._old.get(flow, -_NEVER)
            if len(self._young) >= self._limit:
                self.forgotten += len(self._old.keys() - self._young.keys())
                self._old, self._young = self._young, {}
            self._young[flow] = last
        return last


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

    def add(self, events: Columns) -> None:
        """Audit events, with `partition`, and `sent_ms`: when the message was sent, however old the event was."""
        counters, slots = self._counters_of(events)
        checked = slots >= 0
        if not checked.all():
            self.unchecked += int(np.count_nonzero(~checked))
            events, counters, slots = events.select(checked), counters[checked], slots[checked]
        is_new = self._numbers.add(slots, events["cpu_seq"])
        if not is_new.all():
            for counter, count in _counted(counters[~is_new]):
                self._counters[counter].boot.duplicates += count
            events, counters = events.select(is_new), counters[is_new]
        if len(counters):
            self._add_new(events, counters)

    def _add_new(self, events: Columns, counters: Ints) -> None:
        partition, flow = events["partition"], _flows(events)
        flows, firsts = groups(partition, flow)
        late = self._order.late(flows, firsts, partition * _SPREAD ^ flow, events["ts_ns"])
        numbers, firsts = groups(counters)
        for number, (counter, count) in enumerate(_counted(counters, numbers, firsts)):
            chosen = slice(None) if len(firsts) == 1 else numbers == number
            found, ts_ns = self._counters[counter], events["ts_ns"][chosen]
            boot = found.boot
            boot.events += count
            boot.first_ns = min(boot.first_ns, int(ts_ns.min()))
            boot.last_ns = max(boot.last_ns, int(ts_ns.max()))
            boot.out_of_order += int(np.count_nonzero(late[chosen]))
            complete = events["cpu_seq"][chosen][events["sent_ms"][chosen] > self._complete_from_ms]
            if len(complete):
                found.complete_from = min(found.complete_from, int(complete.min()))

    def boots(self) -> Iterator[BootReport]:
        """Yield the reports, by host and then by the boots' first event."""
        gaps = {
            counter: find_gaps(pieces, self._counters[counter].complete_from)
            for counter, pieces in self._numbers.held()
        }
        for boot in sorted(self._boots.values(), key=lambda boot: (boot.host, boot.first_ns)):
            yield _report(boot, {cpu: gaps[counter.index] for cpu, counter in sorted(boot.counters.items())})

    def _counters_of(self, events: Columns) -> tuple[Ints, Ints]:
        """Return each event's counter, and the slot of its number's page; the slot is -1 if a limit allows none."""
        columns = [events["host"], events["boot_id"], events["cpu"], page_of(events["cpu_seq"])]
        numbers, firsts = groups(*columns)
        found = [
            self._counter(events.texts[host], events.texts[boot_id], cpu, page)
            for host, boot_id, cpu, page in zip(*(column[firsts].tolist() for column in columns), strict=True)
        ]
        counters, slots = np.array(found, np.int64).reshape(len(found), 2).T
        return counters[numbers], slots[numbers]

    def _counter(self, host: str, boot_id: str, cpu: int, page: int) -> tuple[int, int]:
        """Return the index of a counter, and the slot of a page; the slot is -1 if a limit allows none."""
        boot = self._boots.get((host, boot_id))
        if boot is None and len(self._boots) >= self._most_boots:
            return 0, -1
        counter = boot.counters.get(cpu) if boot is not None else None
        index = len(self._counters) if counter is None else counter.index
        slot = self._numbers.slot(index, page)
        if slot is None:
            return 0, -1
        if boot is None:
            boot = self._boots[host, boot_id] = _Boot(host, boot_id)
        if counter is None:
            complete_from = ALL if self._complete_from_ms == ALL else _NEVER
            counter = boot.counters[cpu] = _Counter(index, boot, complete_from)
            self._counters.append(counter)
        return index, slot


def _counted(counters: Ints, numbers: Ints | None = None, firsts: Ints | None = None) -> list[tuple[int, int]]:
    """Return each counter and how many rows it has, in order of appearance."""
    if numbers is None or firsts is None:
        numbers, firsts = groups(counters)
    return list(zip(counters[firsts].tolist(), np.bincount(numbers).tolist(), strict=True))


def _flows(events: Columns) -> Ints:
    """Return a hash of each event's host, boot, addresses and ports. Hosts may have the same private addresses."""
    texts = [events.hashes[events[name]] for name in ("host", "boot_id", "saddr", "daddr")]
    return row_hashes([*texts, events["sport"], events["dport"]])


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
