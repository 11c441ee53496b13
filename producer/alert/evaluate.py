"""Second stage, without I/O: from the sums of all sources to alerts, for the groups of one partition of the sums topic.

Windows are decided in order, each when the watermarks of all sources (partitions of event topics) have passed its end.
A new owner resumes from `position`, with the `decided_ns` of that time and the last alert of each of its groups. It
decides again what its predecessor had decided but not committed. Windows up to a group's last alert change nothing, so
no alert is sent twice.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from sys import getsizeof

from producer.alert.model import Alert
from producer.alert.windows import MEMORY_BYTES, MOST_SEGS, Grouping, Sums
from producer.config.load import AlertRule

_SECOND_NS = 1_000_000_000
RETRANSMITS, TRANSMITS = "retransmits", "transmits"
MOST_FIRING = 10_000
"""Most groups that fire at once, per rule and partition of the sums topic; others are suppressed."""
_WINDOW_BYTES, _SOURCE_BYTES, _GROUP_BYTES = 400, 400, 200
"""Memory of a window, of a source in it, and of a group of that, without names. A topic's writers choose them."""


def grouping_of(rule: AlertRule) -> Grouping:
    """Return the grouping that a rule needs."""
    return Grouping(rule.by, round(rule.window_s * _SECOND_NS))


class _Window:
    """The sums of one window, by stream and source."""

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.size = _WINDOW_BYTES
        self._sources: dict[tuple[str, str], dict[str, int]] = {}

    def put(self, stream: str, source: str, sums: Sums, room: int) -> int:
        """Set a source's sums; return how many groups did not fit into `room` bytes."""
        before, skipped = self.size, 0
        segs = self._sources.get((stream, source))
        if segs is None:
            size = _SOURCE_BYTES + getsizeof(source)
            if size > room:
                return len(sums.segs)
            segs = self._sources[stream, source] = {}
            self.size += size
        for group, count in sums.segs.items():
            if group not in segs:
                size = _GROUP_BYTES + getsizeof(group)
                if self.size - before + size > room:
                    skipped += 1
                    continue
                self.size += size
            segs[group] = count
        return skipped

    def totals(self, wanted: str) -> dict[str, int]:
        total: dict[str, int] = defaultdict(int)
        for (stream, _), segs in self._sources.items():
            if stream == wanted:
                for group, count in segs.items():
                    total[group] = min(MOST_SEGS, total[group] + count)
        return total


class Decider:
    """Evaluates rules.

    `sources` are the partitions of event topics. `last_alerts` has the last alert of each group; firing alerts whose
    rule was removed are resolved.
    """

    def __init__(
        self,
        rules: Iterable[AlertRule],
        sources: Collection[str],
        last_alerts: Iterable[Alert],
        first: int,
        decided_ns: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._rules = list(rules)
        self._watermarks = dict.fromkeys(sources, 0)
        self._windows: dict[Grouping, dict[int, _Window]] = {grouping_of(rule): {} for rule in self._rules}
        self._last: dict[str, dict[str, Alert]] = {rule.name: {} for rule in self._rules}
        self._firing: dict[str, set[str]] = {rule.name: set() for rule in self._rules}
        self._free_bytes = memory_bytes
        self._orphaned: list[Alert] = []
        kinds = {(rule.name, rule.by, rule.measure) for rule in self._rules}
        for alert in last_alerts:
            if (alert.rule, alert.by, alert.measure) in kinds:
                self._note(alert)
            elif alert.firing:
                self._orphaned.append(replace(alert, firing=False))
        self.next = first
        """The offset to read next."""
        self.decided_ns = decided_ns
        """Windows that end at or before this are decided."""
        self.suppressed = 0
        """Alerts not sent because MOST_FIRING groups were firing."""

    @property
    def position(self) -> int:
        """The offset to resume from: the first sums of an undecided window."""
        firsts = (window.first_offset for windows in self._windows.values() for window in windows.values())
        return min(firsts, default=self.next)

    @property
    def firing(self) -> list[Alert]:
        """The firing alerts."""
        return [self._last[rule][group] for rule, groups in self._firing.items() for group in groups]

    def add(self, stream: str, source: str, sums: Sums, offset: int) -> int:
        """Add sums; ignore those of decided windows or without a rule.

        Return how many groups were skipped for lack of memory.
        """
        self.next = offset + 1
        windows = self._windows.get(sums.grouping)
        if windows is None or sums.start_ns % sums.grouping.width_ns or stream not in (RETRANSMITS, TRANSMITS):
            return 0
        if sums.start_ns + sums.grouping.width_ns <= self.decided_ns:
            return 0
        window = windows.get(sums.start_ns)
        if window is None:
            if self._free_bytes < _WINDOW_BYTES:
                return len(sums.segs)
            window = windows[sums.start_ns] = _Window(offset)
            self._free_bytes -= window.size
        before = window.size
        skipped = window.put(stream, source, sums, self._free_bytes)
        self._free_bytes -= window.size - before
        return skipped

    def advance(self, source: str, watermark_ns: int, offset: int) -> None:
        """Advance a source's watermark."""
        self.next = offset + 1
        if source in self._watermarks:
            self._watermarks[source] = max(self._watermarks[source], watermark_ns)

    def decide(self) -> list[Alert]:
        """Decide all complete windows; return the changes in order of time."""
        reached_ns = max(self.decided_ns, min(self._watermarks.values(), default=0))
        changes, self._orphaned = self._orphaned, []
        for rule in self._rules:
            changes += self._rule(rule, reached_ns)
        for grouping, windows in self._windows.items():
            for start_ns in [start for start in windows if start + grouping.width_ns <= reached_ns]:
                self._free_bytes += windows.pop(start_ns).size
        for rule in self._rules:
            self._forget(self._last[rule.name], reached_ns - grouping_of(rule).width_ns)
        self.decided_ns = reached_ns
        return changes

    @staticmethod
    def _forget(last: dict[str, Alert], start_ns: int) -> None:
        """Forget resolved alerts of windows that cannot be decided again: there are many flows."""
        for group in [group for group, alert in last.items() if not alert.firing and alert.window_start_ns <= start_ns]:
            del last[group]

    def _note(self, alert: Alert) -> None:
        """Set a group's last alert."""
        self._last[alert.rule][alert.group] = alert
        firing = self._firing[alert.rule]
        if alert.firing:
            firing.add(alert.group)
        else:
            firing.discard(alert.group)

    def _rule(self, rule: AlertRule, reached_ns: int) -> Iterator[Alert]:
        grouping = grouping_of(rule)
        after_ns = self.decided_ns - grouping.width_ns  # windows that begin after this are not decided
        starts = sorted(
            start for start in self._windows[grouping] if after_ns < start <= reached_ns - grouping.width_ns
        )
        at = 0
        while True:
            # The next window with sums, or the next after a firing group's last alert.
            candidates = [*starts[at : at + 1], *self._after_alerts(rule.name, grouping, after_ns)]
            start_ns = min(candidates, default=reached_ns)
            if start_ns + grouping.width_ns > reached_ns:
                return
            for alert in self._window(rule, self._last[rule.name], start_ns):
                self._note(alert)
                yield alert
            after_ns = start_ns
            while at < len(starts) and starts[at] <= start_ns:
                at += 1

    def _after_alerts(self, rule: str, grouping: Grouping, after_ns: int) -> Iterator[int]:
        """Yield, for each firing group, the next window after its last alert."""
        for group in self._firing[rule]:
            behind_ns = max(after_ns, self._last[rule][group].window_start_ns)
            yield behind_ns - behind_ns % grouping.width_ns + grouping.width_ns

    def _window(self, rule: AlertRule, last: dict[str, Alert], start_ns: int) -> Iterator[Alert]:
        window = self._windows[grouping_of(rule)].get(start_ns)
        again = window.totals(RETRANSMITS) if window else {}
        total = window.totals(TRANSMITS) if window and rule.measure == "ratio" else {}
        for group in sorted({*again, *self._firing[rule.name]}):
            before = last.get(group)
            if before is None or before.window_start_ns < start_ns:
                alert = _judged(rule, group, start_ns, again.get(group, 0), total.get(group, 0), before)
                if alert is None:
                    continue
                if alert.firing and len(self._firing[rule.name]) >= MOST_FIRING:
                    self.suppressed += 1
                    continue
                yield alert


def _judged(rule: AlertRule, group: str, start_ns: int, again: int, total: int, before: Alert | None) -> Alert | None:
    is_ratio = rule.measure == "ratio"
    # At most 1: the two topics may differ at a window's edge.
    value = min(1.0, again / max(total, 1)) if is_ratio else float(again)
    is_enough = (total if is_ratio else again) >= rule.minimum
    was_firing = before is not None and before.firing
    is_change = value < rule.clear if was_firing else is_enough and value >= rule.threshold
    if not is_change:
        return None
    return Alert(
        rule=rule.name,
        by=rule.by,
        group=group,
        firing=not was_firing,
        measure=rule.measure,
        value=value,
        threshold=rule.threshold,
        clear=rule.clear,
        window_start_ns=start_ns,
        window_s=rule.window_s,
        segs=total,
        retransmitted_segs=again,
        since_ns=before.since_ns if before is not None and was_firing else start_ns,
    )
