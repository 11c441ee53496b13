"""The figures of a report. Pure: from events to numbers and names."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from producer.consume.period import Period
from producer.events import FLOWS, RETRANSMITS, Ints
from producer.host.endpoints import endpoint
from producer.report.collect import Collected, FlowChoice, Quality
from producer.report.connections import CAUSES, Connections, connections
from producer.report.frame import Frame
from producer.view.limits import LIMITS

MOST_LINES = 10
MOST_FLOWS, LEAST_SEGMENTS = 3, 5
"""Connections that are drawn, and the retransmissions of those beside the worst one: fewer make no picture."""
_BINS = 60
_GROUPS = {"peer": "daddr", "host": "host", "unit": "unit"}


@dataclass(frozen=True, slots=True)
class Totals:
    """Segments of all connections in the period."""

    sent: int
    """With retransmissions and acknowledgements."""
    retransmitted: int
    causes: Mapping[str, int]
    spurious: int
    """Retransmitted segments that the peer already had (DSACK)."""
    connections: int
    partial: int
    """Connections whose figures begin with their first record in the period."""
    failed: int
    """Connects that failed."""


@dataclass(frozen=True, slots=True)
class Line:
    """A peer, host or unit. `sent` is None if there are no connection records."""

    name: str
    retransmitted: int
    sent: int | None
    cause: str
    """The most frequent one."""
    failed: int = 0

    @property
    def ratio(self) -> float | None:
        """Retransmitted segments divided by those sent."""
        return self.retransmitted / self.sent if self.sent else None


@dataclass(frozen=True, slots=True)
class Limited:
    """Connections that something limited, and their segments."""

    limit: str
    connections: int
    sent: int
    retransmitted: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Failed connects to a peer with an error."""

    error: str
    peer: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Retransmitted segments by cause and time: `edges_s` are seconds since 1970, one more than the bins."""

    edges_s: NDArray[np.float64]
    causes: Mapping[str, Ints]

    @property
    def total(self) -> int:
        """All segments."""
        return sum(int(each.sum()) for each in self.causes.values())


@dataclass(frozen=True, slots=True, eq=False)
class WorstFlow:
    """A connection with many retransmissions: its rows in the retransmits."""

    host: str
    numbers: tuple[int, int, int]
    """Its cookie, or 0, and both ports."""
    name: str
    owner: str
    rows: Ints
    retransmitted: int


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """All figures of a report."""

    period: Period
    first_ns: int
    last_ns: int
    totals: Totals | None
    """None if there are no connection records."""
    worst: Mapping[str, list[Line]]
    limited: list[Limited]
    failures: list[Failure]
    srtt_us: Ints
    """Of each connection that has been measured."""
    timeline: Timeline | None
    flows: list[WorstFlow]
    retransmits: Frame
    quality: Mapping[str, Quality]
    undecodable: int


def summarize(collected: Collected, period: Period) -> Summary:
    """Return the figures of the events in the period."""
    flows, retransmits = collected.frames[FLOWS], collected.frames[RETRANSMITS].distinct()
    found = connections(flows, period.since_ns)
    times = [frame.numbers("ts_ns") for frame in (flows, retransmits) if len(frame)]
    first_ns = period.since_ns or min((int(each.min()) for each in times), default=0)
    last_ns = max((int(each.max()) for each in times), default=first_ns)
    srtt_us = found.gauge("srtt_us")
    return Summary(
        period,
        first_ns,
        last_ns,
        _totals(found) if len(found) else None,
        {
            title: _of_connections(found, name) if len(found) else _of_events(retransmits, name)
            for title, name in _GROUPS.items()
        },
        _limited(found),
        _failures(found),
        srtt_us[srtt_us > 0],
        _timeline(retransmits, first_ns, last_ns) if len(retransmits) else None,
        _worst_flows(retransmits) if len(retransmits) else [],
        retransmits,
        {stream.topic: quality for stream, quality in collected.quality.items()},
        collected.undecodable,
    )


def flow_choice(summary: Summary) -> FlowChoice:
    """Return the choice of the worst flows' segments."""
    return FlowChoice(frozenset((flow.host, *flow.numbers) for flow in summary.flows))


def _totals(found: Connections) -> Totals:
    grown = {name: int(column.sum()) for name, column in found.growth.items()}
    return Totals(
        grown["segs_out"],
        grown["total_retrans"],
        {cause: grown[f"retrans_{cause}"] for cause in CAUSES},
        int(np.minimum(found.growth["dsack_dups"], found.growth["total_retrans"]).sum()),
        len(found),
        int(np.count_nonzero(found.partial)),
        len(found.failures),
    )


def _of_connections(found: Connections, name: str) -> list[Line]:
    codes, texts = found.codes(name) + 1, found.flows.texts(name)
    sums = {key: _summed(codes, column, len(texts)) for key, column in found.growth.items()}
    failed = _summed(found.flows.codes(name)[found.failures] + 1, np.ones_like(found.failures), len(texts))
    causes = np.stack([sums[f"retrans_{cause}"] for cause in CAUSES])
    order = np.lexsort((-failed, -sums["total_retrans"]))
    return [
        Line(
            texts[at - 1],
            int(sums["total_retrans"][at]),
            int(sums["segs_out"][at]),
            CAUSES[int(causes[:, at].argmax())] if causes[:, at].any() else "",
            int(failed[at]),
        )
        for at in order.tolist()
        if at and (sums["total_retrans"][at] or failed[at])
    ][:MOST_LINES]


def _of_events(retransmits: Frame, name: str) -> list[Line]:
    if not len(retransmits):
        return []
    codes, texts = retransmits.codes(name) + 1, retransmits.texts(name)
    segments, causes = segments_of(retransmits), retransmits.codes("cause")
    by_cause = np.stack(
        [_summed(codes[causes == each], segments[causes == each], len(texts)) for each in range(causes.max() + 1)]
    )
    sums = by_cause.sum(axis=0)
    return [
        Line(texts[at - 1], int(sums[at]), None, retransmits.texts("cause")[int(by_cause[:, at].argmax())])
        for at in np.argsort(-sums, kind="stable").tolist()
        if at and sums[at]
    ][:MOST_LINES]


def _summed(codes: Ints, values: Ints, count: int) -> Ints:
    """Return the sum of values by code, of codes from 0 to `count`."""
    sums = np.zeros(count + 1, np.int64)
    np.add.at(sums, codes, values)
    return sums


def segments_of(retransmits: Frame) -> Ints:
    """Return the segments that each event stands for."""
    segments: Ints = retransmits.numbers("segs") * np.maximum(1, retransmits.numbers("sample_rate"))
    return segments


def _limited(found: Connections) -> list[Limited]:
    found = found.select(found.established())
    by_limit = found.limits()
    counts, sent, retransmitted = (
        _summed(by_limit, values, len(LIMITS))
        for values in (np.ones(len(found), np.int64), found.growth["segs_out"], found.growth["total_retrans"])
    )
    return [
        Limited(limit, int(counts[at]), int(sent[at]), int(retransmitted[at]))
        for at, limit in enumerate(LIMITS)
        if counts[at]
    ]


def _failures(found: Connections) -> list[Failure]:
    counts = Counter(
        (found.flows.text("error", row) or "closed by its process", found.flows.text("daddr", row) or "")
        for row in found.failures.tolist()
    )
    return [Failure(error, peer, count) for (error, peer), count in counts.most_common(MOST_LINES)]


def _timeline(retransmits: Frame, first_ns: int, last_ns: int) -> Timeline:
    times, segments, causes = retransmits.numbers("ts_ns"), segments_of(retransmits), retransmits.codes("cause")
    edges = np.linspace(first_ns, max(last_ns, first_ns + 1_000_000_000), _BINS + 1)
    bins = np.clip(np.searchsorted(edges, times, "right") - 1, 0, _BINS - 1)
    texts = retransmits.texts("cause")
    by_cause = {}
    for cause in sorted(texts, key=lambda each: CAUSES.index(each) if each in CAUSES else len(CAUSES)):
        chosen = causes == texts.index(cause)
        by_cause[cause] = np.bincount(bins[chosen], weights=segments[chosen], minlength=_BINS).astype(np.int64)
    return Timeline(edges / 1e9, by_cause)


def _worst_flows(retransmits: Frame) -> list[WorstFlow]:
    ids, firsts = retransmits.connections()
    sums = np.bincount(ids, weights=segments_of(retransmits))
    found = []
    worst = np.argsort(-sums, kind="stable")[:MOST_FLOWS].tolist()
    for number in [number for number in worst if number == worst[0] or sums[number] >= LEAST_SEGMENTS]:
        row = int(firsts[number])
        rows = np.flatnonzero(ids == number)
        rows = rows[np.argsort(retransmits.numbers("ts_ns")[rows], kind="stable")]
        ends = [
            endpoint(retransmits.text(address, row) or "", int(retransmits.numbers(port)[row]))
            for address, port in (("saddr", "sport"), ("daddr", "dport"))
        ]
        owner = retransmits.text("unit", row) or retransmits.text("comm", row) or ""
        cookie, sport, dport = (int(retransmits.numbers(name)[row]) for name in ("sk_cookie", "sport", "dport"))
        host = retransmits.text("host", row) or ""
        found.append(WorstFlow(host, (cookie, sport, dport), " > ".join(ends), owner, rows, int(sums[number])))
    return found
