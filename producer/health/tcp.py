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

from producer.connections import Connections
from producer.events import CAUSES, FLOWS, RETRANSMITS, ROLES, Rows, Stream
from producer.host.clock import kernel_ns

MOST_CONNECTIONS = 1 << 16
"""Connections that are remembered. Those beyond it are counted when they close."""
_FEW_CONNECTIONS = 1 << 13
"""From here on, closed connections are forgotten: these fit into a CPU's cache."""
_CLOSED_NS = 10**9
"""Closed connections are remembered for this long, as their last two records may have changed places."""
_FORGOTTEN_NS = 600 * 10**9
"""Without room, connections without a record for this long are forgotten: their closing record was lost."""

_SYN_ACK = CAUSES.index("syn_ack")
_CONNECT = "connect"
_PHASES = (_CONNECT, "established")
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
_ERROR_INDEX = np.full(256, len(ERRORS) - 1, np.uint8)
_ERROR_INDEX[[getattr(errno, name) for name in ERRORS[:-1]]] = range(len(ERRORS) - 1)

_SRTT_BOUNDS_S = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
_SRTT_BOUNDS_US = np.rint(np.array(_SRTT_BOUNDS_S) * 1e6).astype(np.int64)
# struct tcp_counts of native/tcp_counts.h
_COUNTS = np.dtype(
    [
        ("segments", "<i8"),
        ("retransmitted", "<i8", len(CAUSES)),
        ("opened", "<i8", len(ROLES)),
        ("closed", "<i8"),
        ("failed", "<i8", (len(_PHASES), len(ERRORS))),
        ("given_up", "<i8"),
        ("srtt", "<i8", len(_SRTT_BOUNDS_S) + 1),
        ("srtt_sum_us", "<i8"),
    ]
)


class TcpMetrics(Collector):
    """Counts rows of the flow and retransmit streams. The metrics of a stream appear once it is captured."""

    def __init__(self, since_ns: int | None = None, most: int = MOST_CONNECTIONS) -> None:
        self._lock = threading.Lock()
        self._captured: set[str] = set()
        since_ns = kernel_ns() if since_ns is None else since_ns
        names = ("segs_out", *(f"retrans_{cause}" for cause in CAUSES))
        self._table = Connections(names, since_ns - 1, most)
        self._room = min(_FEW_CONNECTIONS, most)
        """The number of connections above which closed ones are dropped."""
        self._counts = np.zeros(1, _COUNTS)
        self._retransmitted = [0] * len(CAUSES)

    def counter(self, stream: Stream) -> Callable[[Rows], None] | None:
        """Return the function to call with each batch of a stream's rows; None if no metric counts them."""
        self._captured.add(stream.name)
        return {RETRANSMITS.name: self._count_retransmissions, FLOWS.name: self._count_connections}.get(stream.name)

    def _count_retransmissions(self, rows: Rows) -> None:
        """Count without numpy, which costs more for the few rows that there mostly are."""
        segment = rows["s"]
        columns = rows["cause"].tolist(), segment["segs"].tolist(), segment["sample_rate"].tolist()
        with self._lock:
            for cause, segments, rate in zip(*columns, strict=True):
                self._retransmitted[cause if cause < len(CAUSES) else 0] += segments * rate

    def _count_connections(self, rows: Rows) -> None:
        with self._lock:
            self._forget(rows)
            self._table.count_flows(rows, _ERROR_INDEX, _SRTT_BOUNDS_US, self._counts)

    def _forget(self, rows: Rows) -> None:
        """Drop closed connections whenever the table has doubled, and without room, open ones that are quiet."""
        if len(self._table) + len(rows) <= self._room:
            return
        newest_ns = int(rows["ts"].astype(np.int64).max(initial=0))
        self._table.forget(newest_ns - _CLOSED_NS)
        if len(self._table) + len(rows) > self._table.most:
            self._table.forget(open_ns=newest_ns - _FORGOTTEN_NS)
        self._room = min(max(_FEW_CONNECTIONS, 2 * len(self._table)), self._table.most)

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
        is_captured = RETRANSMITS.name in self._captured
        counts = self._retransmitted if is_captured else self._counts["retransmitted"][0].tolist()
        for cause, count in zip(CAUSES, counts, strict=True):
            family.add_metric([cause], count)
        return family

    def _connections(self) -> Iterator[Metric]:
        counts = self._counts[0]
        segments = counts["segments"].item()
        if RETRANSMITS.name in self._captured:  # these have the SYN-ACKs of connections that were never completed, too
            segments = max(0, segments - counts["retransmitted"][_SYN_ACK].item())
            segments += self._retransmitted[_SYN_ACK]
        text = "Segments sent by connections, retransmissions included."
        yield CounterMetricFamily("rebpf_tcp_segments", text, segments)
        text = "Connections that began: client called connect, server accepted."
        opened = CounterMetricFamily("rebpf_tcp_connections_opened", text, labels=["role"])
        for role, count in zip(ROLES[1:], counts["opened"][1:].tolist(), strict=True):
            opened.add_metric([role], count)
        yield opened
        text = "Connections that ended."
        yield CounterMetricFamily("rebpf_tcp_connections_closed", text, counts["closed"].item())
        text = "Connections that the kernel ended with an error, and connects that a process gave up (none)."
        failed = CounterMetricFamily("rebpf_tcp_connections_failed", text, labels=["phase", "error"])
        for phase, by_error in zip(_PHASES, counts["failed"].tolist(), strict=True):
            for error, count in zip(ERRORS, by_error, strict=True):
                failed.add_metric([phase, error], count)
        failed.add_metric([_CONNECT, _NO_ERROR], counts["given_up"].item())
        yield failed

    def _round_trips(self) -> Metric:
        text = "Smoothed round-trip times: one for each record of a connection that has sent since its last record."
        bounds = [*map(str, _SRTT_BOUNDS_S), "+Inf"]
        counts = self._counts[0]
        totals = accumulate(counts["srtt"].tolist())
        return HistogramMetricFamily(
            "rebpf_tcp_srtt_seconds",
            text,
            buckets=list(zip(bounds, totals, strict=True)),
            sum_value=counts["srtt_sum_us"].item() / 1e6,
        )
