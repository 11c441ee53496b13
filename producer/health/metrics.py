"""All metrics: counters of the running producer, and the values of its last status.

Nothing here is called per event. Every label has a bounded set of values: topics, hooks, stages, reasons (including the
names of librdkafka's errors), kinds of retry, and the labels of the site.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from tenacity import RetryCallState

from producer.health.balance import STAGES, stage
from producer.health.status import Status, StreamStatus
from producer.health.tcp import TcpMetrics
from producer.host import stdio

_RETRIES = Counter("rebpf_retries", "Retries, by what was retried.", ["what"], registry=None)
_RETRY_WAIT = Counter("rebpf_retry_wait_seconds", "Seconds waited before retries.", ["what"], registry=None)
_KAFKA_ERRORS = Counter("rebpf_kafka_errors", "Errors of librdkafka, by name.", ["error"], registry=None)
_STEP_ERRORS = Counter("rebpf_step_errors", "Failed steps of the loop, by step.", ["step"], registry=None)
for _what in ("kafka_send", "kafka_client", "spool", "registry", "heartbeat"):  # exported before the first retry
    _RETRIES.labels(_what)
    _RETRY_WAIT.labels(_what)

_STREAM_COUNTERS: tuple[tuple[str, str, Callable[[StreamStatus], int]], ...] = (
    (
        "rebpf_events_passed",
        "Events that passed the filter, without those that the spool held at the start.",
        lambda stream: stream.balance.passed - stream.balance.carried,
    ),
    ("rebpf_events_delivered", "Events that Kafka acknowledged.", lambda stream: stream.balance.delivered),
)
_STREAM_GAUGES: tuple[tuple[str, str, Callable[[StreamStatus], int]], ...] = (
    (
        "rebpf_events_carried",
        "Events of an earlier run that the spool held when the rings were created.",
        lambda stream: stream.balance.carried,
    ),
    ("rebpf_events_in_flight", "Events in flight to Kafka.", lambda stream: stream.balance.in_flight),
    ("rebpf_events_in_ring", "Events in the ring, not yet read.", lambda stream: stream.balance.in_ring),
    ("rebpf_events_spooled", "Events on disk, not in flight.", lambda stream: stream.balance.spooled),
    ("rebpf_ring_bytes", "Size of the ring.", lambda stream: stream.ring_bytes),
    ("rebpf_ring_used_bytes", "Bytes of the ring in use.", lambda stream: stream.ring_used_bytes),
    ("rebpf_spool_bytes", "Size of the spool on disk.", lambda stream: stream.spool_bytes),
    ("rebpf_spool_max_bytes", "Size limit of the spool; 0 if there is none.", lambda stream: stream.spool_max_bytes),
)


def retried(what: str, wait_s: float) -> None:
    """Count a retry and the seconds waited before it."""
    _RETRIES.labels(what).inc()
    _RETRY_WAIT.labels(what).inc(wait_s)


def step_failed(step: str) -> None:
    """Count a failed step of the loop."""
    _STEP_ERRORS.labels(step).inc()


def counted(what: str) -> Callable[[RetryCallState], None]:
    """Return a `before_sleep` for tenacity's Retrying that counts the retries."""
    return lambda state: retried(what, state.upcoming_sleep)


def kafka_error(name: str, count: int = 1) -> None:
    """Count an error that librdkafka reported for its client or for `count` messages."""
    _KAFKA_ERRORS.labels(name).inc(count)


class _Histogram(Collector):
    """A histogram that takes many equal observations in one call, unlike that of prometheus_client."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int = 1) -> None:
        """Record `count` equal values."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += count
            self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            totals, total = list(accumulate(self._counts)), self._sum
        bounds = [*map(str, self._bounds), "+Inf"]
        yield HistogramMetricFamily(
            self._name, self._text, buckets=list(zip(bounds, totals, strict=True)), sum_value=total
        )


DELIVERY = _Histogram(
    "rebpf_delivery_seconds",
    "Seconds from the kernel's timestamp of a batch's oldest event to the acknowledgement of the batch.",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
STEPS = _Histogram(
    "rebpf_step_seconds", "Duration of the loop's steps in seconds.", (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
)
TCP = TcpMetrics()
"""Counts from the start of the process."""


class _StatusCollector(Collector):
    """Metrics of the status, once there is one, and the seconds since the loop's last step."""

    def __init__(self, status: Callable[[], Status | None], idle_s: Callable[[], float]) -> None:
        self._status = status
        self._idle_s = idle_s

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rebpf_loop_idle_seconds",
            "Seconds since the loop's last step; more than a few mean that it hangs.",
            self._idle_s(),
        )
        text = "Log lines dropped because standard error was full or closed."
        yield CounterMetricFamily("rebpf_log_lines_dropped", text, stdio.dropped_lines())
        status = self._status()
        if status is None:
            return
        yield InfoMetricFamily("rebpf_build", "The producer's version.", {"version": status.version})
        yield InfoMetricFamily("rebpf_site", "The labels of the site.", dict(status.labels))
        degraded = float(bool(status.reasons))
        yield GaugeMetricFamily("rebpf_degraded", "1 if degraded: /status has the reasons; otherwise 0.", degraded)
        yield GaugeMetricFamily("rebpf_rules_version", "Version of the rules in force.", status.rules_version)
        yield InfoMetricFamily("rebpf_config", "Hash of the configuration in force.", {"hash": status.config_hash})
        text = "Changed settings that need a restart: /status has their names."
        yield GaugeMetricFamily("rebpf_restart_needed", text, len(status.restart_needed))
        yield GaugeMetricFamily(
            "rebpf_transmit_sample_rate",
            "One in this many connections has its transmits captured, by the budget; 1: all.",
            status.transmit_sample_rate,
        )
        hooks = InfoMetricFamily("rebpf_hook", "The hook that captures the events of a topic.", labels=["topic"])
        lost = CounterMetricFamily("rebpf_events_lost", "Events lost.", labels=["topic", "stage", "reason"])
        for stream in status.streams:
            hooks.add_metric([stream.topic], {"hook": stream.hook})
            # The rate of a counter that appears with its first loss would miss it.
            for reason, count in {**dict.fromkeys(STAGES, 0), **stream.balance.lost}.items():
                lost.add_metric([stream.topic, stage(reason), reason], count)
        yield from (hooks, lost)
        for name, text, value in _STREAM_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["topic"])
            for stream in status.streams:
                counter.add_metric([stream.topic], value(stream))
            yield counter
        for name, text, value in _STREAM_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["topic"])
            for stream in status.streams:
                gauge.add_metric([stream.topic], value(stream))
            yield gauge


def registry(status: Callable[[], Status | None], idle_s: Callable[[], float]) -> CollectorRegistry:
    """Return all metrics. Those of the status are read at each scrape."""
    metrics = CollectorRegistry()
    for each in (_RETRIES, _RETRY_WAIT, _KAFKA_ERRORS, _STEP_ERRORS, DELIVERY, STEPS, TCP):
        metrics.register(each)
    metrics.register(_StatusCollector(status, idle_s))
    ProcessCollector(registry=metrics)
    return metrics
