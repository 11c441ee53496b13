"""Metrics of TCP on this host, counted from batches of events: segments, retransmissions, connections, round trips.

A record of a connection has counters since the connection began, so it adds the difference to the connection's last
record, which a table remembers. A connection that began in this run counts from its beginning; an older one from its
first record in this run. So after a restart nothing is counted twice or all at once, and what older connections sent
between the last record of one run and the first of the next is not counted.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from producer.events import CAUSES, FLOWS, KNOWN, REASONS, RETRANSMITS, ROLES, STATES, Rows, Stream

Counts = NDArray[np.uint32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST_CONNECTIONS = 1 << 16
"""Connections in the table. Those beyond it are counted when they close."""
_FORGOTTEN_NS = 600 * 10**9
"""A full table drops connections without a record for this long: their closing record was lost."""

_CONNECT, _ESTABLISHED = "connect", "established"
_NO_ERROR, _OTHER = "none", "other"
ERRORS = (
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "ECONNABORTED",
    "EPIPE",
    "EPROTO",
    "EACCES",
    _OTHER,
)
_ERROR_INDEX = np.full(256, len(ERRORS) - 1)
_ERROR_INDEX[[getattr(errno, name) for name in ERRORS[:-1]]] = range(len(ERRORS) - 1)

_SRTT_BOUNDS_S = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
"""Odd numbers: their multiples are far apart."""
_CLOSE = REASONS.index("close")
_SYN_SENT = STATES.index("SYN_SENT")
_SERVER = ROLES.index("server")


@dataclass(frozen=True, slots=True)
class Connections:
    """The last record of each connection in a batch, and its new segments: those sent, and retransmitted by cause."""

    at: Ints
    """Indexes of the records in the batch."""
    opened: Mask
    """Connections that began in this run and had no record yet."""
    segments: Ints
    retransmitted: Ints


class ConnectionTable:
    """The counters of open connections at their last record. `since_ns` is the run's start on the monotonic clock."""

    def __init__(self, since_ns: int, most: int = MOST_CONNECTIONS) -> None:
        self._since_ns = since_ns
        self._most = most
        self._keys = np.empty(0, np.uint64)
        """Ascending; the other columns have the same order."""
        self._last = np.empty((0, 1 + len(CAUSES)), np.uint32)
        self._starts = np.empty(0, np.uint64)
        self._seen = np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, rows: Rows) -> Connections:
        """Take a batch of records, and return what they add to the records before them."""
        keys, first, last = _by_connection(rows)
        counters, starts, ts = _counters(rows), rows["start_ns"][last], rows["ts"][last]
        closed = rows["reason"][last] == _CLOSE
        began = starts >= max(self._since_ns, 1)
        at = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), np.bool_)
        inside = at < len(self._keys)
        known[inside] = self._keys[at[inside]] == keys[inside]
        before = np.where(began[:, None], np.uint32(0), counters[first])
        before[known] = self._last[at[known]]
        counters = counters[last]
        # Counters of 32 bits may wrap, and records of one connection may be a little out of order.
        more = np.maximum((counters - before).view(np.int32), 0).astype(np.int64)
        is_open = known & ~closed
        self._last[at[is_open]] = (before + more.astype(np.uint32))[is_open]
        self._seen[at[is_open]] = ts[is_open]
        inserted = self._change(at[known & closed], ~known & ~closed, keys, counters, starts, ts)
        opened = began & ~known & (closed | inserted)
        more[began & ~known & ~opened] = 0
        return Connections(last, opened, more[:, 0], more[:, 1:])

    def _change(
        self,
        closed: NDArray[Any],
        new: Mask,
        keys: NDArray[np.uint64],
        counters: Counts,
        starts: NDArray[np.uint64],
        ts: NDArray[np.uint64],
    ) -> Mask:
        """Remove entries and insert new connections, as many as fit; return which were inserted."""
        keep = np.ones(len(self._keys), np.bool_)
        keep[closed] = False
        if int(keep.sum()) + int(new.sum()) > self._most:
            self._forget(keep, int(ts.max()))
        new = new & (np.cumsum(new) <= self._most - int(keep.sum()))
        if new.any() or not keep.all():
            merged = np.concatenate([self._keys[keep], keys[new]])
            order = np.argsort(merged, kind="stable")
            self._keys = merged[order]
            self._last = np.concatenate([self._last[keep], counters[new]])[order]
            self._starts = np.concatenate([self._starts[keep], starts[new]])[order]
            self._seen = np.concatenate([self._seen[keep], ts[new]])[order]
        return new

    def _forget(self, keep: Mask, now_ns: int) -> None:
        """Drop what has had no record for long. If it has one after all, it counts like an older connection."""
        stale = keep & (self._seen < max(0, now_ns - _FORGOTTEN_NS))
        if stale.any():
            self._since_ns = max(self._since_ns, min(int(self._starts[stale].max()) + 1, now_ns))
            keep &= ~stale


def _by_connection(rows: Rows) -> tuple[NDArray[np.uint64], Ints, Ints]:
    """Return each connection's key, ascending, and the indexes of its first and last record; a closing one is last.

    A socket can connect again, so the time of the start is part of the key.
    """
    flow = rows["flow"]
    keys: NDArray[np.uint64] = (
        flow["sk_cookie"] + rows["start_ns"] * _MIX[0] + flow["netns"].astype(np.uint64) * _MIX[1]
    )
    order = np.lexsort((rows["reason"], keys))
    keys = keys[order]
    differ = keys[1:] != keys[:-1]
    first, last = np.append(True, differ), np.append(differ, True)
    return keys[last], order[first], order[last]


def _counters(rows: Rows) -> Counts:
    """Return the segments sent and those retransmitted by cause.

    The kernel counts an accepted connection's SYN-ACK before the connection has a socket: it is added here.
    """
    counters = np.empty((len(rows), 1 + len(CAUSES)), np.uint32)
    counters[:, 0] = rows["segs_out"] + rows["retrans_syn_ack"] + (rows["role"] == _SERVER).astype(np.uint32)
    for column, cause in enumerate(CAUSES, 1):
        counters[:, column] = rows[f"retrans_{cause}"]
    return counters


class TcpMetrics(Collector):
    """Counts rows of the flow and retransmit streams. The metrics of a stream appear once it is captured."""

    def __init__(self, since_ns: int | None = None) -> None:
        self._lock = threading.Lock()
        self._captured: set[str] = set()
        self._table = ConnectionTable(time.monotonic_ns() if since_ns is None else since_ns)
        self._segments = 0
        self._retransmitted = np.zeros(len(CAUSES))
        self._opened = np.zeros(len(ROLES), np.int64)
        self._closed = 0
        self._failed = {phase: np.zeros(len(ERRORS), np.int64) for phase in (_CONNECT, _ESTABLISHED)}
        self._given_up = 0
        self._srtt = np.zeros(len(_SRTT_BOUNDS_S) + 1, np.int64)
        self._srtt_sum_us = 0

    def counter(self, stream: Stream) -> Callable[[Rows], None] | None:
        """Return what counts a stream's rows, each batch once; None if nothing does."""
        self._captured.add(stream.name)
        return {RETRANSMITS.name: self._count_retransmissions, FLOWS.name: self._count_connections}.get(stream.name)

    def _count_retransmissions(self, rows: Rows) -> None:
        segment = rows["s"]
        segments = segment["segs"].astype(np.float64) * segment["sample_rate"]
        causes = np.where(rows["cause"] < len(CAUSES), rows["cause"], 0)
        with self._lock:
            self._retransmitted += np.bincount(causes, segments, len(CAUSES))

    def _count_connections(self, rows: Rows) -> None:
        with self._lock:
            found = self._table.add(rows)
            self._segments += int(found.segments.sum())
            if RETRANSMITS.name not in self._captured:
                self._retransmitted += found.retransmitted.sum(axis=0)
            roles = rows["role"][found.at[found.opened]]
            self._opened += np.bincount(np.where(roles < len(ROLES), roles, 0), minlength=len(ROLES))
            self._count_closed(rows, found.at[rows["reason"][found.at] == _CLOSE])
            self._observe_srtt(rows, found.at[found.segments > 0])

    def _count_closed(self, rows: Rows, at: Ints) -> None:
        self._closed += len(at)
        connecting = rows["state"][at] == _SYN_SENT
        has_error = (rows["known"][at] & KNOWN["error"]) != 0
        errors = _ERROR_INDEX[np.minimum(rows["error"][at], len(_ERROR_INDEX) - 1)]
        for phase, chosen in ((_CONNECT, connecting), (_ESTABLISHED, ~connecting)):
            self._failed[phase] += np.bincount(errors[chosen & has_error], minlength=len(ERRORS))
        self._given_up += int((connecting & ~has_error).sum())

    def _observe_srtt(self, rows: Rows, at: Ints) -> None:
        srtt_us = rows["srtt_us"][at]
        srtt_us = srtt_us[((rows["known"][at] & KNOWN["tcp"]) != 0) & (srtt_us > 0)]
        buckets = np.searchsorted(np.array(_SRTT_BOUNDS_S) * 1e6, srtt_us)
        self._srtt += np.bincount(buckets, minlength=len(self._srtt))
        self._srtt_sum_us += int(srtt_us.sum(dtype=np.int64))

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of what is captured."""
        with self._lock:
            families = []
            if self._captured & {RETRANSMITS.name, FLOWS.name}:
                families.append(self._retransmissions())
            if FLOWS.name in self._captured:
                families += [*self._connections(), self._round_trips()]
        yield from families

    def _retransmissions(self) -> Metric:
        text = "Segments retransmitted, by cause."
        family = CounterMetricFamily("rebpf_tcp_retransmitted_segments", text, labels=["cause"])
        for cause, count in zip(CAUSES, self._retransmitted.tolist(), strict=True):
            family.add_metric([cause], count)
        return family

    def _connections(self) -> Iterator[Metric]:
        text = "Segments sent by connections, retransmissions included."
        yield CounterMetricFamily("rebpf_tcp_segments", text, self._segments)
        text = "Connections that began: client called connect, server accepted."
        opened = CounterMetricFamily("rebpf_tcp_connections_opened", text, labels=["role"])
        for role, count in zip(ROLES[1:], self._opened[1:].tolist(), strict=True):
            opened.add_metric([role], count)
        yield opened
        yield CounterMetricFamily("rebpf_tcp_connections_closed", "Connections that ended.", self._closed)
        text = "Connections that the kernel ended with an error, and connects that a process gave up (none)."
        failed = CounterMetricFamily("rebpf_tcp_connections_failed", text, labels=["phase", "error"])
        for phase, counts in self._failed.items():
            for error, count in zip(ERRORS, counts.tolist(), strict=True):
                failed.add_metric([phase, error], count)
        failed.add_metric([_CONNECT, _NO_ERROR], self._given_up)
        yield failed

    def _round_trips(self) -> Metric:
        text = "Smoothed round-trip times: one for each record of a connection that has sent since its last record."
        bounds = [*map(str, _SRTT_BOUNDS_S), "+Inf"]
        totals = accumulate(self._srtt.tolist())
        return HistogramMetricFamily(
            "rebpf_tcp_srtt_seconds",
            text,
            buckets=list(zip(bounds, totals, strict=True)),
            sum_value=self._srtt_sum_us / 1e6,
        )
