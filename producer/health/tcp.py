"""Metrics of TCP on this host, counted from batches of events: segments, retransmissions, connections, round trips.

A connection that began in this run counts from its beginning; an older one from its first record in this run. So after
a restart nothing is counted twice or all at once, and what older connections sent between the last record of one run
and the first of the next is not counted.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from producer.connections import Connections, Growth, Ints, mixed
from producer.events import CAUSES, FLOWS, KNOWN, REASONS, RETRANSMITS, ROLES, STATES, Rows, Stream
from producer.host.clock import kernel_ns

MOST_CONNECTIONS = 1 << 16
"""Connections that are remembered. Those beyond it are counted when they close."""
_FORGOTTEN_NS = 600 * 10**9
"""Without room, connections without a record for this long are forgotten: their closing record was lost."""

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
_CLOSE = REASONS.index("close")
_SYN_SENT = STATES.index("SYN_SENT")
_SERVER = ROLES.index("server")


class TcpMetrics(Collector):
    """Counts rows of the flow and retransmit streams. The metrics of a stream appear once it is captured."""

    def __init__(self, since_ns: int | None = None, most: int = MOST_CONNECTIONS) -> None:
        self._lock = threading.Lock()
        self._captured: set[str] = set()
        since_ns = kernel_ns() if since_ns is None else since_ns
        names = ("segs_out", *(f"retrans_{cause}" for cause in CAUSES))
        self._table = Connections(names, since_ns - 1, most)
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
            found = self._growth(rows)
            totals = found.counts.sum(axis=0)
            self._segments += int(totals[0])
            if RETRANSMITS.name not in self._captured:
                self._retransmitted += totals[1:]
            roles = rows["role"][found.opened]
            self._opened += np.bincount(np.where(roles < len(ROLES), roles, 0), minlength=len(ROLES))
            self._count_closed(rows, np.flatnonzero(found.closed))
            self._observe_srtt(rows, np.flatnonzero(found.counts[:, 0]))

    def _growth(self, rows: Rows) -> Growth:
        flow, ts_ns, start_ns = rows["flow"], rows["ts"].astype(np.int64), rows["start_ns"].astype(np.int64)
        if len(self._table) + len(rows) > self._table.most:
            self._table.forget(open_ns=int(ts_ns.max()) - _FORGOTTEN_NS)
        # A socket can connect again, so the time of the start is part of the key.
        keys = mixed([flow["sk_cookie"].astype(np.int64), start_ns, flow["netns"].astype(np.int64)])
        # The kernel counts an accepted connection's SYN-ACK before the connection has a socket: it is added here.
        segs_out = rows["segs_out"].astype(np.int64) + rows["retrans_syn_ack"] + (rows["role"] == _SERVER)
        retransmitted = (rows[f"retrans_{cause}"] for cause in CAUSES)
        closes = rows["reason"] == _CLOSE
        return self._table.add(keys, ts_ns, start_ns, closes, [segs_out, *retransmitted])

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
