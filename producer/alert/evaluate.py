"""From a rule's sums to alerts, without I/O.

Windows are decided in order. After a failover, the windows of `for_s` before the undecided ones are read again, to
learn which groups have reached the threshold, but change nothing. Neither do windows up to a group's last alert: what
was decided but not committed is decided again, and no alert is sent twice.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from producer.alert.model import Alert, Counts
from producer.alert.windows import MOST_SEGS, Group, Windows
from producer.config.alerts import AlertRule

MOST_FIRING = 10_000
"""Most groups of a rule that fire at once; others are suppressed."""
_SHOWN, _SHOWN_CHARACTERS = 5, 3000
RATIOS = ("ratio", "data_ratio")


def windows_before(rule: AlertRule) -> int:
    """Return how many windows before must have reached the threshold, too."""
    return math.ceil(rule.for_s / rule.window_s)


class Evaluator:
    """Decides the windows of a rule after `decided_ns`. `last_alerts` has the last alert of each group."""

    def __init__(self, windows: Windows, last_alerts: Iterable[Alert], decided_ns: int, counts: Counts) -> None:
        self._windows, self._rule, self._width_ns = windows, windows.rule, windows.width_ns
        self._last = {alert.group: alert for alert in last_alerts}
        self._firing = {group for group, alert in self._last.items() if alert.firing}
        self._holding: dict[str, int] = {}
        """Start of the first of the windows up to now that all reached the threshold, by group."""
        self._before_ns = windows_before(self._rule) * self._width_ns
        self._old_ns = decided_ns
        self.decided_ns = max(0, decided_ns - decided_ns % self._width_ns - self._before_ns)
        """Windows that end at or before this are decided."""
        self._counts = counts

    @property
    def firing(self) -> list[Alert]:
        """The firing alerts."""
        return [self._last[group] for group in sorted(self._firing)]

    def decide(self, reached_ns: int) -> list[Alert]:
        """Decide all windows that end by `reached_ns`; return the changes in order of time."""
        changes = []
        for start_ns in iter(lambda: self._next(reached_ns), None):
            for alert in self._window(start_ns, self._windows.take(start_ns)):
                self._note(alert)
                changes.append(alert)
            self.decided_ns = start_ns + self._width_ns
        self.decided_ns = max(self.decided_ns, reached_ns - reached_ns % self._width_ns)
        # A resolved alert is needed only while its window may be decided again.
        for group in [group for group, last in self._last.items() if not last.firing]:
            if self._last[group].window_start_ns + self._width_ns < self.decided_ns:
                del self._last[group]
        return changes

    def _next(self, reached_ns: int) -> int | None:
        """Return the next window with sums, or the next one of a group that fires or reached the threshold."""
        starts = self._windows.starts()[:1]
        if self._firing or self._holding:
            alerts = () if self._holding else (self._last[group].window_start_ns + 1 for group in self._firing)
            after_ns = max(self.decided_ns, min(alerts, default=0))
            starts.append(-(-after_ns // self._width_ns) * self._width_ns)
        return min((start for start in starts if start + self._width_ns <= reached_ns), default=None)

    def _note(self, alert: Alert) -> None:
        self._last[alert.group] = alert
        (self._firing.add if alert.firing else self._firing.discard)(alert.group)

    def _window(self, start_ns: int, groups: Mapping[str, Group]) -> Iterator[Alert]:
        holding = {}
        for name in sorted({*groups, *self._firing}):
            group = groups.get(name) or Group(name)
            value = value_of(self._rule, group)
            if value >= self._rule.threshold and _size(self._rule, group) >= self._rule.minimum:
                holding[name] = self._holding.get(name, start_ns)
            last = self._last.get(name)
            is_decided = start_ns + self._width_ns <= self._old_ns or (last and last.window_start_ns >= start_ns)
            if is_decided:
                continue
            is_firing = name in self._firing
            if is_firing and value < self._rule.clear:
                yield self._alert(group, value, start_ns, last.since_ns if last else start_ns, firing=False)
            elif not is_firing and name in holding and start_ns - holding[name] >= self._before_ns:
                if len(self._firing) >= MOST_FIRING:
                    self._counts.crowded += 1
                else:
                    yield self._alert(group, value, start_ns, holding[name], firing=True)
        self._holding = holding

    def _alert(self, group: Group, value: float, start_ns: int, since_ns: int, *, firing: bool) -> Alert:
        rule = self._rule
        return Alert(
            rule=rule.name,
            by=rule.by,
            group=group.name,
            firing=firing,
            measure=rule.measure,
            value=value,
            threshold=rule.threshold,
            clear=rule.clear,
            window_start_ns=start_ns,
            window_s=rule.window_s,
            segs=min(MOST_SEGS, group.total),
            retransmitted_segs=group.part if rule.measure in (*RATIOS, "count") else 0,
            since_ns=since_ns,
            severity=rule.severity,
            labels=json.dumps(dict(rule.labels)),
            annotations=json.dumps(dict(rule.annotations)),
            causes=_shown(group.causes, " "),
            hosts=_shown(_by_host(group.flows, is_srtt=rule.measure == "srtt"), " "),
            flows=_shown(group.flows, ", "),
        )


def resolved(alerts: Iterable[Alert]) -> list[Alert]:
    """Return the end of alerts whose rule was removed."""
    return [replace(alert, firing=False) for alert in alerts if alert.firing]


def value_of(rule: AlertRule, group: Group) -> float:
    """Return a rule's measure of a group."""
    if rule.measure == "srtt":
        return group.quantile_s(rule.quantile)
    # At most 1: the kernel counts a retransmission before its segment, and a record in between divides them.
    return min(1.0, group.part / max(group.total, 1)) if rule.measure in RATIOS else float(group.part)


def _size(rule: AlertRule, group: Group) -> int:
    """Return what is compared with the rule's minimum."""
    return group.part if rule.measure in ("count", "failed_connects") else group.total


def _by_host(flows: Mapping[str, int], *, is_srtt: bool) -> dict[str, int]:
    hosts: dict[str, int] = {}
    for flow, weight in flows.items():
        host = flow.rpartition(" ")[0]
        before = hosts.get(host, 0)
        hosts[host] = max(before, weight) if is_srtt else before + weight
    return hosts


def _shown(weights: Mapping[str, int], separator: str) -> str:
    largest = sorted(weights.items(), key=lambda each: (-each[1], each[0]))[:_SHOWN]
    return separator.join(f"{name}={min(MOST_SEGS, weight)}" for name, weight in largest)[:_SHOWN_CHARACTERS]
