"""Second stage, without I/O: from the sums of all partitions to alerts, for the groups of one partition of the sums.

Window after window is decided, each once the watermarks of all partitions of the topics of events have passed its end.
A reader that takes over goes on from `position`, with the `decided_ns` of that time and the last alert of each of its
groups. It decides again what its predecessor had decided and not committed; since it changes nothing in a window at or
before that of a group's last alert, the changes that were told already are not told again.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from producer.alert.model import Alert
from producer.alert.windows import MOST_SEGS, ROOM_BYTES, Sums, View
from producer.config.load import AlertRule

_SECOND_NS = 1_000_000_000
RETRANSMITS, TRANSMITS = "retransmits", "transmits"
MOST_FIRING = 10_000
"""Groups that fire at a time, for one rule in one partition of the sums: more are not told."""
_GROUP_BYTES = 200
"""Memory of a group in a window, beside its name."""


def view_of(rule: AlertRule) -> View:
    """Return what is summed for a rule."""
    return View(rule.by, round(rule.window_s * _SECOND_NS))


class _Window:
    """The sums of one window, by stream and partition."""

    def __init__(self, first_offset: int) -> None:
        self.first_offset = first_offset
        self.size = 0
        self._parts: dict[tuple[str, str], dict[str, int]] = {}

    def put(self, stream: str, part: str, sums: Sums, room: int) -> int:
        """Take sums, which replace what the partition had said before; return how many groups had no room."""
        segs, before = self._parts.setdefault((stream, part), {}), self.size
        left_out = 0
        for group, count in sums.segs.items():
            if group not in segs:
                size = _GROUP_BYTES + len(group)
                if self.size - before + size > room:
                    left_out += 1
                    continue
                self.size += size
            segs[group] = count
        return left_out

    def totals(self, wanted: str) -> dict[str, int]:
        total: dict[str, int] = defaultdict(int)
        for (stream, _), segs in self._parts.items():
            if stream == wanted:
                for group, count in segs.items():
                    total[group] = min(MOST_SEGS, total[group] + count)
        return total


class Decider:
    """Decides for some rules over some groups.

    `sources` are the partitions of events. `known` are the last alerts of these groups; those that fire and whose rule
    is no more are resolved.
    """

    def __init__(
        self,
        rules: Iterable[AlertRule],
        sources: Collection[str],
        known: Iterable[Alert],
        first: int,
        decided_ns: int = 0,
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        self._rules = list(rules)
        self._watermarks = dict.fromkeys(sources, 0)
        self._windows: dict[View, dict[int, _Window]] = {view_of(rule): {} for rule in self._rules}
        self._last: dict[str, dict[str, Alert]] = {rule.name: {} for rule in self._rules}
        self._firing: dict[str, set[str]] = {rule.name: set() for rule in self._rules}
        self._room = room_bytes
        self._gone: list[Alert] = []
        kinds = {(rule.name, rule.by, rule.measure) for rule in self._rules}
        for alert in known:
            if (alert.rule, alert.by, alert.measure) in kinds:
                self._note(alert)
            elif alert.firing:
                self._gone.append(replace(alert, firing=False))
        self.next = first
        """The offset to read next."""
        self.decided_ns = decided_ns
        """Windows that end by now are decided."""
        self.untold = 0
        """Groups that would fire, while MOST_FIRING did."""

    @property
    def position(self) -> int:
        """The offset to go on from after a restart: of the first sums of a window that is not decided."""
        firsts = (window.first_offset for windows in self._windows.values() for window in windows.values())
        return min(firsts, default=self.next)

    @property
    def firing(self) -> list[Alert]:
        """What fires."""
        return [self._last[rule][group] for rule, groups in self._firing.items() for group in groups]

    def add(self, stream: str, part: str, sums: Sums, offset: int) -> int:
        """Take sums of a partition; those of decided windows, and of no rule, are passed over.

        Return how many groups were left out, for want of memory.
        """
        self.next = offset + 1
        windows = self._windows.get(sums.view)
        if windows is None or sums.start_ns % sums.view.width_ns or stream not in (RETRANSMITS, TRANSMITS):
            return 0
        if sums.start_ns + sums.view.width_ns <= self.decided_ns:
            return 0
        window = windows.get(sums.start_ns)
        if window is None:
            if self._room < _GROUP_BYTES:
                return len(sums.segs)
            window = windows[sums.start_ns] = _Window(offset)
        before = window.size
        left_out = window.put(stream, part, sums, self._room)
        self._room -= window.size - before
        return left_out

    def pass_time(self, part: str, watermark_ns: int, offset: int) -> None:
        """Take a partition's watermark."""
        self.next = offset + 1
        if part in self._watermarks:
            self._watermarks[part] = max(self._watermarks[part], watermark_ns)

    def decide(self) -> list[Alert]:
        """Decide over the windows that are complete; return what changes, in the order of time."""
        reached_ns = max(self.decided_ns, min(self._watermarks.values(), default=0))
        changes, self._gone = self._gone, []
        for rule in self._rules:
            changes += self._rule(rule, reached_ns)
        for view, windows in self._windows.items():
            for start_ns in [start for start in windows if start + view.width_ns <= reached_ns]:
                self._room += windows.pop(start_ns).size
        for rule in self._rules:
            self._forget(self._last[rule.name], reached_ns - view_of(rule).width_ns)
        self.decided_ns = reached_ns
        return changes

    @staticmethod
    def _forget(last: dict[str, Alert], start_ns: int) -> None:
        """Forget what is resolved, where no window up to that of the alert can be decided again: flows are many."""
        for group in [group for group, alert in last.items() if not alert.firing and alert.window_start_ns <= start_ns]:
            del last[group]

    def _note(self, alert: Alert) -> None:
        """Keep a group's last alert."""
        self._last[alert.rule][alert.group] = alert
        firing = self._firing[alert.rule]
        if alert.firing:
            firing.add(alert.group)
        else:
            firing.discard(alert.group)

    def _rule(self, rule: AlertRule, reached_ns: int) -> Iterator[Alert]:
        view = view_of(rule)
        after_ns = self.decided_ns - view.width_ns  # windows that begin after this are not decided
        starts = sorted(start for start in self._windows[view] if after_ns < start <= reached_ns - view.width_ns)
        at = 0
        while True:
            # One with sums; or, where a group fires, just the next, behind its last alert.
            candidates = [*starts[at : at + 1], *self._behind_alerts(rule.name, view, after_ns)]
            start_ns = min(candidates, default=reached_ns)
            if start_ns + view.width_ns > reached_ns:
                return
            for alert in self._window(rule, self._last[rule.name], start_ns):
                self._note(alert)
                yield alert
            after_ns = start_ns
            while at < len(starts) and starts[at] <= start_ns:
                at += 1

    def _behind_alerts(self, rule: str, view: View, after_ns: int) -> Iterator[int]:
        """Yield, for each group that fires, the next window behind its last alert."""
        for group in self._firing[rule]:
            behind_ns = max(after_ns, self._last[rule][group].window_start_ns)
            yield behind_ns - behind_ns % view.width_ns + view.width_ns

    def _window(self, rule: AlertRule, last: dict[str, Alert], start_ns: int) -> Iterator[Alert]:
        window = self._windows[view_of(rule)].get(start_ns)
        again = window.totals(RETRANSMITS) if window else {}
        total = window.totals(TRANSMITS) if window and rule.measure == "ratio" else {}
        for group in sorted({*again, *self._firing[rule.name]}):
            before = last.get(group)
            if before is None or before.window_start_ns < start_ns:
                alert = _judged(rule, group, start_ns, again.get(group, 0), total.get(group, 0), before)
                if alert is None:
                    continue
                if alert.firing and len(self._firing[rule.name]) >= MOST_FIRING:
                    self.untold += 1
                    continue
                yield alert


def _judged(rule: AlertRule, group: str, start_ns: int, again: int, total: int, before: Alert | None) -> Alert | None:
    is_ratio = rule.measure == "ratio"
    # No more than all: the two topics may differ at a window's edge.
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
