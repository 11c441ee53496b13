"""All metrics, declared once: what is counted while the producer runs, and what its last status says.

Nothing here is called for a single event. Every label takes a bounded set of values: topics, hooks, stages, reasons (of
which the open-ended ones are the names of librdkafka's errors), and the kinds of retry.
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

from producer.health.balance import stage
from producer.health.status import Status, StreamStatus
from producer.host import stdio

_RETRIES = Counter("rebpf_retries", "Tries after a failed one, by what was tried.", ["what"], registry=None)
_RETRY_WAIT = Counter("rebpf_retry_wait_seconds", "Seconds waited before these tries.", ["what"], registry=None)
_KAFKA_ERRORS = Counter("rebpf_kafka_errors", "Errors of librdkafka, by their name.", ["error"], registry=None)
_STEP_ERRORS = Counter("rebpf_step_errors", "Failures of the loop's steps, by step.", ["step"], registry=None)
for _what in ("kafka_send", "kafka_client", "spool", "registry", "heartbeat"):  # there before the first
    _RETRIES.labels(_what)
    _RETRY_WAIT.labels(_what)

_SHOWN_AT_ZERO = (
    "ring_full",
    "nested",
    "old_ring",
    "ring_damaged",
    "encode",
    "spool_dropped",
    "spool_expired",
    "spool_damaged",
    "stopped",
)
"""Reasons that are shown before the first loss: the rate of a counter that appears with its first loss misses it."""

_STREAM_COUNTERS: tuple[tuple[str, str, Callable[[StreamStatus], int]], ...] = (
    (
        "rebpf_events_passed",
        "Events that passed the filter, without those that the spool held at first.",
        lambda stream: stream.balance.passed - stream.balance.carried,
    ),
    ("rebpf_events_delivered", "Events that Kafka has acknowledged.", lambda stream: stream.balance.delivered),
)
_STREAM_GAUGES: tuple[tuple[str, str, Callable[[StreamStatus], int]], ...] = (
    (
        "rebpf_events_carried",
        "Events of an earlier run that the spool held when the rings were made.",
        lambda stream: stream.balance.carried,
    ),
    ("rebpf_events_in_flight", "Events under way to Kafka.", lambda stream: stream.balance.in_flight),
    ("rebpf_events_in_ring", "Events in the ring, not yet read.", lambda stream: stream.balance.in_ring),
    ("rebpf_events_spooled", "Events on disk, and not under way.", lambda stream: stream.balance.spooled),
    ("rebpf_ring_bytes", "Size of the ring.", lambda stream: stream.ring_bytes),
    ("rebpf_ring_used_bytes", "Bytes of the ring that are taken.", lambda stream: stream.ring_used_bytes),
    ("rebpf_spool_bytes", "Bytes of the spool on disk.", lambda stream: stream.spool_bytes),
    ("rebpf_spool_max_bytes", "Most bytes of the spool; 0: there is none.", lambda stream: stream.spool_max_bytes),
)


def retried(what: str, wait_s: float) -> None:
    """Count another try, and the seconds waited before it."""
    _RETRIES.labels(what).inc()
    _RETRY_WAIT.labels(what).inc(wait_s)


def step_failed(step: str) -> None:
    """Count a failure of a step of the loop."""
    _STEP_ERRORS.labels(step).inc()


def counted(what: str) -> Callable[[RetryCallState], None]:
    """Return what counts the tries of a tenacity Retrying as its `before_sleep`."""
    return lambda state: retried(what, state.upcoming_sleep)


def kafka_error(name: str, count: int = 1) -> None:
    """Count an error that librdkafka reported, of its client or of so many messages."""
    _KAFKA_ERRORS.labels(name).inc(count)


class _Histogram(Collector):
    """A histogram that takes many equal observations at once, which prometheus_client's own does not."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int) -> None:
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


_DELIVERY = _Histogram(
    "rebpf_delivery_seconds",
    "Seconds from the kernel's time of a batch's oldest event to the batch's acknowledgement.",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)


def observe_delivery(seconds: float, count: int) -> None:
    """Note that so many events were acknowledged, all after so many seconds."""
    _DELIVERY.observe(seconds, count)


_STEPS = _Histogram(
    "rebpf_step_seconds",
    "Seconds that a step of the loop took.",
    (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0),
)


def observe_step(seconds: float) -> None:
    """Note that a step of the loop took so many seconds."""
    _STEPS.observe(seconds, 1)


class _StatusCollector(Collector):
    """Metrics of a status, which may not be there yet, and the seconds since the loop's last step."""

    def __init__(self, status: Callable[[], Status | None], idle_s: Callable[[], float]) -> None:
        self._status = status
        self._idle_s = idle_s

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rebpf_loop_idle_seconds", "Seconds since the loop's last step: more than a few, it hangs.", self._idle_s()
        )
        text = "Lines of the log that standard error has not taken."
        yield CounterMetricFamily("rebpf_log_lines_dropped", text, stdio.dropped_lines())
        status = self._status()
        if status is None:
            return
        yield InfoMetricFamily("rebpf_build", "The producer's version.", {"version": status.version})
        degraded = float(bool(status.reasons))
        yield GaugeMetricFamily("rebpf_degraded", "1 where /status names reasons, otherwise 0.", degraded)
        yield GaugeMetricFamily("rebpf_rules_version", "Version of the rules in force.", status.rules_version)
        hooks = InfoMetricFamily("rebpf_hook", "The hook that takes a topic's events.", labels=["topic"])
        lost = CounterMetricFamily("rebpf_events_lost", "Events lost.", labels=["topic", "stage", "reason"])
        for stream in status.streams:
            hooks.add_metric([stream.topic], {"hook": stream.hook})
            for reason, count in {**dict.fromkeys(_SHOWN_AT_ZERO, 0), **stream.balance.lost}.items():
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
    """Return all metrics, of which those of the status are taken when they are asked for."""
    metrics = CollectorRegistry()
    for each in (_RETRIES, _RETRY_WAIT, _KAFKA_ERRORS, _STEP_ERRORS, _DELIVERY, _STEPS):
        metrics.register(each)
    metrics.register(_StatusCollector(status, idle_s))
    ProcessCollector(registry=metrics)
    return metrics
