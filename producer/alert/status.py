"""The state of a member for its endpoint: /status, /metrics and /healthz."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from producer.alert.model import Counts

_GAUGES = {
    "active": "1 on the active member, 0 on a standby.",
    "lag_seconds": "Age of the time up to which windows are decided, without lateness_s; 0 on a standby.",
    "lag_messages": "Messages that Kafka has and the member has not read; 0 on a standby.",
    "firing": "Firing alerts.",
}
_COUNTERS = {
    "read": "Records read.",
    "late": "Records that arrived after their window was decided.",
    "duplicate": "Events with an id that was counted before.",
    "ahead": "Records from more than an hour ahead, not counted.",
    "crowded": "Records, hosts and alerts dropped because a limit was reached.",
    "forgotten": "Ids and connections forgotten for lack of memory.",
    "undecodable": "Messages that are not ours.",
    "alerts": "Alerts sent, both firing and resolved.",
}


@dataclass(frozen=True, slots=True)
class AlertStatus:
    """What a member does, since it started."""

    counts: Counts
    is_active: bool = False
    lag_s: float = 0.0
    lag_messages: int = 0
    firing: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it for /status."""
        state = "active" if self.is_active else "standby"
        gauges = {"lag_s": round(self.lag_s, 3), "lag_messages": self.lag_messages, "firing": self.firing}
        return {"state": state, "reasons": [], **gauges, **asdict(self.counts)}


class _Collector(Collector):
    def __init__(self, status: Callable[[], AlertStatus | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        if status is None:
            return
        gauges = (float(status.is_active), status.lag_s, float(status.lag_messages), float(status.firing))
        for (name, text), value in zip(_GAUGES.items(), gauges, strict=True):
            yield GaugeMetricFamily(f"rebpf_alert_{name}", text, value=value)
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"rebpf_alert_{name}", text, value=getattr(status.counts, name))


def registry(status: Callable[[], Any]) -> CollectorRegistry:
    """Return all metrics of a member."""
    made = CollectorRegistry()
    made.register(_Collector(status))
    ProcessCollector(registry=made)
    return made
