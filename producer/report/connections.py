"""What happened on each connection in a period.

A connection that began before the period and has no earlier record is counted from its first record in the period, so
what happened between the beginning of the period and that record, at most an interval, is not in the figures.
"""

from dataclasses import dataclass

import numpy as np

from producer.connections import Connections as Table
from producer.events import CAUSES as EVENT_CAUSES
from producer.report.frame import Frame, Ints, Mask
from producer.view.limits import Interval, limits

CAUSES = (*EVENT_CAUSES[1:], EVENT_CAUSES[0])
"""Those of events, with `other` last."""
COUNTERS = (
    "segs_out",
    "data_segs_out",
    "bytes_sent",
    "total_retrans",
    *(f"retrans_{cause}" for cause in CAUSES),
    "dsack_dups",
    "busy_time_us",
    "rwnd_limited_us",
    "sndbuf_limited_us",
)
GAUGES = ("srtt_us", "min_rtt_us", "snd_cwnd", "mss")
TEXTS = ("host", "boot_id", "saddr", "daddr", "unit", "container", "comm", "role", "reason", "state", "error")
COLUMNS = frozenset(
    {*COUNTERS, *GAUGES, *TEXTS, "ts_ns", "cpu", "cpu_seq", "netns", "sk_cookie", "sport", "dport", "start_ns"}
)
MARGIN_NS = 120_000_000_000
"""How long before a period records are read; longer than the interval of records."""


_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Connections:
    """The connections with a record in the period: `last` is its row in `flows`, `growth` that of its counters."""

    flows: Frame
    last: Ints
    growth: dict[str, Ints]
    elapsed_us: Ints
    partial: Mask
    """Whether the beginning of the connection, or of the period, is not covered."""
    failures: Ints
    """Rows in `flows` of connects that failed: closed before they were established. A socket may try again."""

    def __len__(self) -> int:
        return len(self.last)

    def gauge(self, name: str) -> Ints:
        """Return the last value of a field; null as 0."""
        return self.flows.numbers(name)[self.last]

    def codes(self, name: str) -> Ints:
        """Return a text's code in `flows`; null as -1."""
        return self.flows.codes(name)[self.last]

    def select(self, chosen: Mask) -> "Connections":
        """Return the chosen connections."""
        growth = {name: column[chosen] for name, column in self.growth.items()}
        elapsed_us, partial = self.elapsed_us[chosen], self.partial[chosen]
        return Connections(self.flows, self.last[chosen], growth, elapsed_us, partial, self.failures)

    def limits(self) -> Ints:
        """Return what limited each connection, as an index of LIMITS."""
        given = {name: self.growth[name] if name in COUNTERS else self.gauge(name) for name in Interval._fields[1:]}
        return limits(Interval(self.elapsed_us, **given))

    def established(self) -> Mask:
        """Return which connections do not wait for an answer to their SYN, and did not when they closed."""
        established: Mask = self.codes("state") != _code(self.flows, "state", "SYN_SENT")
        return established


def connections(flows: Frame, since_ns: int | None) -> Connections:
    """Return what happened from `since_ns` on, or a margin before the first record; `flows` may have earlier ones."""
    ids, firsts = flows.connections()
    ts_ns, start_ns, codes = flows.numbers("ts_ns"), flows.numbers("start_ns"), flows.codes("reason")
    closes = codes == _code(flows, "reason", "close")
    accepted = flows.codes("role") == _code(flows, "role", "server")
    if since_ns is None:
        since_ns = max(0, int(ts_ns.min()) - MARGIN_NS) if len(ts_ns) else 0
    table = Table(COUNTERS, since_ns - 1, max(1, len(firsts)))
    last = np.full(len(firsts), -1, np.int64)
    sums = np.zeros((len(firsts), 1 + len(COUNTERS)), np.int64)
    covered = np.zeros(len(firsts), np.bool_)
    failed = np.zeros(len(flows), np.bool_)
    order = np.argsort(ts_ns, kind="stable")
    for rows in np.split(order, range(_ROWS, len(order), _ROWS)):
        counters = [flows.numbers(name)[rows] for name in COUNTERS]
        found = table.add(ids[rows], ts_ns[rows], start_ns[rows], closes[rows], counters, accepted=accepted[rows])
        inside = ts_ns[rows] >= since_ns
        covered[ids[rows[~inside | found.opened]]] = True
        chosen = rows[inside]
        failed[chosen] = found.closed[inside]
        last[ids[chosen]] = chosen  # of equal indexes, the last assignment stays
        np.add.at(sums, ids[chosen], np.column_stack([found.elapsed_ns, found.counts])[inside])
    seen = last >= 0
    growth = {name: sums[seen, 1 + column] for column, name in enumerate(COUNTERS)}
    failed &= flows.codes("state") == _code(flows, "state", "SYN_SENT")
    return Connections(flows, last[seen], growth, sums[seen, 0] // 1000, ~covered[seen], np.flatnonzero(failed))


def _code(frame: Frame, name: str, text: str) -> int:
    return frame.texts(name).index(text) if text in frame.texts(name) else -2
