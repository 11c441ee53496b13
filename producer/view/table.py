"""The table of `rebpf top`: connections grouped by peer, flow, host, unit, ... with rates over the last seconds."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer.connections import service_port
from producer.consume.addresses import subnet
from producer.events import CAUSES, Ints
from producer.host.endpoints import endpoint
from producer.view.flows import HISTORY_S, Activity, Flows, interval
from producer.view.limits import IDLE, LIMITS, limits

SORTS = ("retransmitted", "ratio", "segments", "srtt", "failed", "flows", "name")
_TEXT_FIELDS = {"peer": "daddr", "host": "host", "unit": "unit", "container": "container", "comm": "comm"}
_NONE = "-"
_OPEN_S = 130.0
"""Connections without a record for longer than this are not counted as open."""


class Line(NamedTuple):
    """A line of the table. Rates are per second; `ratio` is None if nothing was sent; times are in microseconds."""

    name: str
    segments: float
    retransmitted: float
    ratio: float | None
    history: list[int]
    """Retransmitted segments in each of the last 60 seconds, oldest first."""
    causes: dict[str, int]
    srtt_p50_us: int | None
    srtt_p95_us: int | None
    failed: int
    flows: int
    limit: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the line for JSON output."""
        return {
            **self._asdict(),
            "segments": round(self.segments, 3),
            "retransmitted": round(self.retransmitted, 3),
            "ratio": None if self.ratio is None else round(self.ratio, 6),
        }


@dataclass(frozen=True, slots=True)
class Table:
    """The lines, and the number of groups, of which only the first have a line."""

    total: Line
    lines: list[Line]
    groups: int


class Detail(NamedTuple):
    """A connection of a line. Retransmissions and ratio are of the last minute."""

    flow: str
    host: str
    who: str
    retransmitted: int
    ratio: float | None
    snd_cwnd: int
    lost_out: int
    rto_us: int
    srtt_us: int
    limit: str | None


def table(flows: Flows, by: str, sort: str, now_s: float, window_s: float, count: int) -> Table:
    """Return the first `count` lines, grouped and sorted."""
    names, group_of_slot = _groups(flows, by)
    activity = flows.activity(now_s)
    grouped = activity.select(activity.retransmitted > 0) if by == "cause" else activity
    group = grouped.cause if by == "cause" else group_of_slot[grouped.slot]
    view = _View(flows, grouped, group, group_of_slot, len(names), now_s, window_s)
    active = view.active()
    keys = -names.ranks() if sort == "name" else view.sort_key(sort)
    order = active[np.argsort(-keys[active], kind="stable")].tolist()
    shown = sorted(order[:count], key=lambda each: (-keys[each], _natural(names(each))))
    all_of_it = (np.zeros_like(activity.slot), np.zeros(len(flows.rows), np.int64))
    whole = _View(flows, activity, *all_of_it, 1, now_s, window_s)
    lines = [view.line(each, names(each)) for each in shown]
    return Table(whole.line(0, "total"), lines, len(order))


def details(flows: Flows, by: str, name: str, now_s: float, count: int) -> list[Detail]:
    """Return the connections of a line with the most retransmissions in the last minute."""
    names, group_of_slot = _groups(flows, by)
    activity = flows.activity(now_s)
    if by == "cause":
        slots = np.unique(activity.slot[(activity.retransmitted > 0) & (activity.cause == CAUSES.index(name))])
    else:
        found = [each for each in range(len(names)) if names(each) == name]
        slots = np.flatnonzero(np.isin(group_of_slot, found))
    retransmitted, resent, segs = (
        np.bincount(activity.slot, column, len(flows.rows))
        for column in (activity.retransmitted, activity.resent, activity.segs)
    )
    worst = slots[np.argsort(-retransmitted[slots], kind="stable")][:count]
    rows, flow_name = flows.rows[worst], _flow_names(flows)
    judged = limits(interval(rows))
    texts = flows.texts()
    return [
        Detail(
            flow_name(slot), texts[row["host"]], texts[row["comm"]] or texts[row["unit"]] or _NONE,
            int(retransmitted[slot]), float(resent[slot] / segs[slot]) if segs[slot] else None,
            int(row["snd_cwnd"]),
            int(row["lost_out"]),
            int(row["rto_us"]),
            int(row["srtt_us"]),
            LIMITS[limit] if row["established"] else None,
        )
        for slot, row, limit in zip(worst.tolist(), rows, judged.tolist(), strict=True)
    ]  # fmt: skip


class _Names:
    """Names of groups, made when they are shown."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    def __call__(self, group: int) -> str:
        return self._name(group) or _NONE

    def ranks(self) -> Ints:
        """Return each group's place in the order of the names."""
        return _ranks([self(group) for group in range(self._count)])


class _FlowNames(_Names):
    """Names of connections; of the many that there can be, only the addresses are compared as text."""

    def __init__(self, flows: Flows) -> None:
        super().__init__(len(flows.rows), _flow_names(flows))
        self._flows = flows

    def ranks(self) -> Ints:
        """Return each connection's place in the order of the names."""
        rows, address = self._flows.rows, _ranks(self._flows.texts())
        order = np.lexsort((rows["dport"], address[rows["daddr"]], rows["sport"], address[rows["saddr"]]))
        return np.argsort(order)


def _ranks(texts: list[str]) -> Ints:
    """Return each text's place in natural order."""
    natural = list(map(_natural, texts))
    return np.argsort(np.array(sorted(range(len(texts)), key=natural.__getitem__), np.int64))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which 10.0.0.9 comes before 10.0.0.10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _groups(flows: Flows, by: str) -> tuple[_Names, Ints]:
    """Return the names of groups, and the group of each slot; -1 if it is in none."""
    rows, texts = flows.rows, flows.texts()
    if by in _TEXT_FIELDS:
        found, groups = np.unique(rows[_TEXT_FIELDS[by]], return_inverse=True)
        cut = 12 if by == "container" else None
        return _Names(len(found), lambda group: texts[found[group]][:cut]), groups
    if by == "port":
        found, groups = np.unique(service_port(rows["sport"], rows["dport"]), return_inverse=True)
        return _Names(len(found), lambda group: str(found[group])), groups
    if by == "subnet":
        addresses, address_of_slot = np.unique(rows["daddr"], return_inverse=True)
        subnets = [subnet(texts[each]) for each in addresses.tolist()]
        names = list(dict.fromkeys(subnets))
        number = {name: index for index, name in enumerate(names)}
        by_address = np.array([number[each] for each in subnets], np.int64)
        return _Names(len(names), names.__getitem__), by_address[address_of_slot] if len(rows) else address_of_slot
    if by == "cause":
        return _Names(len(CAUSES), CAUSES.__getitem__), np.full(len(rows), -1)
    return _FlowNames(flows), np.arange(len(rows))


def _flow_names(flows: Flows) -> Callable[[int], str]:
    rows, texts = flows.rows, flows.texts()

    def name(slot: int) -> str:
        row = rows[slot]
        return f"{endpoint(texts[row['saddr']], row['sport'])} > {endpoint(texts[row['daddr']], row['dport'])}"

    return name


class _View:
    """Sums by group."""

    def __init__(
        self,
        flows: Flows,
        activity: Activity,
        group: Ints,
        group_of_slot: Ints,
        count: int,
        now_s: float,
        window_s: float,
    ) -> None:
        self._rows, self._group_of_slot = flows.rows, group_of_slot
        self._activity, self._group, self._now_s, self._window_s = activity, group, now_s, window_s
        recent = activity.at_s > now_s - window_s
        sums = (activity.segs, activity.resent, activity.retransmitted, activity.failed)
        self.segs, self.resent, self.retransmitted, self.failed = (
            np.bincount(group[recent], column[recent], count) for column in sums
        )
        is_open = ~self._rows["closed"] & (self._rows["seen_s"] > now_s - _OPEN_S) & self._rows["counted"]
        self._open = is_open & (group_of_slot >= 0)
        self.flows = np.bincount(group_of_slot[self._open], minlength=count)
        self._minute = np.bincount(group, activity.retransmitted + activity.failed, count)

    def active(self) -> Ints:
        """Return the groups with traffic in the window, or retransmissions in the last minute, or open connections."""
        return np.flatnonzero((self.segs > 0) | (self._minute > 0) | (self.flows > 0))

    def sort_key(self, sort: str) -> NDArray[np.float64]:
        """Return the number by which groups are sorted, the highest first."""
        if sort == "srtt":
            return self._median_srtt_us()
        by_name = {
            "segments": self.segs, "ratio": self.resent / np.maximum(self.segs, 1), "failed": self.failed,
            "flows": self.flows,
        }  # fmt: skip
        # Of groups with as many in the window, the one with more in the last minute comes first.
        return by_name.get(sort, self.retransmitted + self._minute / 1e9).astype(np.float64)

    def _median_srtt_us(self) -> NDArray[np.float64]:
        """Return the median of each group's open connections; 0 if none is measured."""
        slots = np.flatnonzero(self._open & (self._rows["srtt_us"] > 0))
        srtt_us, groups = self._rows["srtt_us"][slots], self._group_of_slot[slots]
        srtt_us = srtt_us[np.lexsort((srtt_us, groups))]
        found, counts = np.unique(groups, return_counts=True)
        firsts = np.cumsum(counts) - counts
        medians = np.zeros(len(self.segs))
        medians[found] = (srtt_us[firsts + (counts - 1) // 2] + srtt_us[firsts + counts // 2]) / 2
        return medians

    def line(self, group: int, name: str) -> Line:
        """Return the line of a group."""
        chosen = self._group == group
        activity = self._activity.select(chosen & (self._activity.retransmitted > 0))
        age = np.minimum((self._now_s - activity.at_s).astype(np.int64), HISTORY_S - 1)
        history = np.bincount(HISTORY_S - 1 - age, activity.retransmitted, HISTORY_S).astype(np.int64)
        causes = np.bincount(activity.cause, activity.retransmitted, len(CAUSES)).astype(np.int64).tolist()
        rows = self._rows[(self._group_of_slot == group) & self._open]
        srtt = rows["srtt_us"][rows["srtt_us"] > 0]
        p50, p95 = np.percentile(srtt, [50, 95]).astype(np.int64).tolist() if len(srtt) else (None, None)
        segs = float(self.segs[group])
        return Line(
            name, segs / self._window_s, float(self.retransmitted[group]) / self._window_s,
            float(self.resent[group]) / segs if segs else None, history.tolist(),
            {cause: number for cause, number in zip(CAUSES, causes, strict=True) if number},
            p50, p95, int(self.failed[group]), int(self.flows[group]), _limit(rows),
        )  # fmt: skip


def _limit(rows: NDArray[np.void]) -> str | None:
    """Return what limited these connections for most of their busy time; None if none was established."""
    rows = rows[rows["established"]]
    if not len(rows):
        return None
    found = interval(rows)
    busy_by_limit = np.bincount(limits(found), np.maximum(found.busy_time_us, 1), len(LIMITS))
    busy_by_limit[IDLE] = 0
    return LIMITS[int(busy_by_limit.argmax())]
