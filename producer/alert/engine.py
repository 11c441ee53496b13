"""Records in, alerts out, without I/O: all rules, the connections, and the ids of counted events.

Time is what the reader has reached, not what the hosts' clocks say: windows are decided when everything that Kafka had
at their end, plus the lateness, has been read.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from producer.alert import connections, measure
from producer.alert.connections import COUNTERS, Fleet
from producer.alert.evaluate import Evaluator, resolved, windows_before
from producer.alert.event_ids import EventIds
from producer.alert.model import Alert, Counts
from producer.alert.silence import Hosts
from producer.alert.windows import MOST_GROUP, Room, Windows
from producer.config.alerts import AlertRule
from producer.consume.columns import Columns, Values
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.plan import Fields
from producer.errors import RebpfError
from producer.events import FLOWS, RETRANSMITS, Mask, Stream

_MS_NS = 1_000_000
AHEAD_NS = 3_600_000_000_000
"""Records further ahead of the reader's clock are ignored."""
IDS_BYTES = 1 << 28
"""Memory for the ids of events."""
_MOST_COUNT, _MOST_RATE, _MOST_SEGS = 1 << 32, 1 << 20, 1 << 31
"""Larger numbers are not a kernel's; with these, the sums of a batch stay within 62 bits."""

FLOW_FIELDS: Fields = (
    *measure.FIELDS,
    *connections.FIELDS,
    ("state", "string"),
    ("error", "string?"),
    ("srtt_us", "long?"),
)
EVENT_FIELDS: Fields = (
    *measure.FIELDS,
    ("boot_id", "string"),
    ("cpu", "long"),
    ("cpu_seq", "long"),
    ("segs", "long"),
    ("cause", "string"),
)


def stream_of(rule: AlertRule) -> Stream:
    """Return the stream that a rule reads."""
    return RETRANSMITS if rule.measure == "count" else FLOWS


class Engine:
    """Evaluates the rules from `decided_ns` on; all records since `since_ns` will be read.

    `last_alerts` has the last alert of each group; those whose rule is gone are resolved.
    """

    def __init__(
        self,
        rules: Sequence[AlertRule],
        last_alerts: Iterable[Alert],
        decided_ns: int,
        since_ns: int,
        decoder: Decoder,
        counts: Counts,
        hosts: Hosts | None = None,
        room: Room | None = None,
    ) -> None:
        room = room or Room()
        self.hosts = hosts or Hosts(0, [])
        self.counts = counts
        self._decoder = decoder
        self._fleet = Fleet(since_ns, counts)
        last: dict[tuple[str, str, str], list[Alert]] = {}
        for alert in last_alerts:
            last.setdefault((alert.rule, alert.by, alert.measure), []).append(alert)
        self._rules: dict[Stream, list[tuple[Windows, Evaluator]]] = {FLOWS: [], RETRANSMITS: []}
        for rule in rules:
            windows, known = Windows(rule, room), last.pop((rule.name, rule.by, rule.measure), [])
            self._rules[stream_of(rule)].append((windows, Evaluator(windows, known, decided_ns, counts)))
        self._orphaned = resolved(chain.from_iterable(last.values()))
        self._ids = EventIds(max((round(rule.window_s * 1e9) for rule in rules), default=1), IDS_BYTES, counts)
        self.decided_ns = decided_ns
        self._open_ns = 0
        """Windows before this are decided, of all rules."""

    @property
    def firing(self) -> list[Alert]:
        """The firing alerts."""
        return [*(alert for _, evaluator in self._all() for alert in evaluator.firing), *self.hosts.firing]

    def _all(self) -> list[tuple[Windows, Evaluator]]:
        return [each for rules in self._rules.values() for each in rules]

    def put(self, stream: Stream, values: Values, now_ns: int) -> str | None:
        """Count messages; return why the first one is not ours, if any is."""
        fields = FLOW_FIELDS if stream is FLOWS else EVENT_FIELDS
        records, rejected = self._decoder.columns(values, fields)
        reason = rejected[0].reason if rejected else None
        possible = _possible(stream, records)
        if not possible.all():
            reason = reason or "numbers or names are out of range"
        self.counts.undecodable += len(rejected) + int(np.count_nonzero(~possible))
        is_ahead = records["ts_ns"] > now_ns + AHEAD_NS
        self.counts.read += int(np.count_nonzero(possible))
        self.counts.ahead += int(np.count_nonzero(possible & is_ahead))
        self._count(stream, records.select(possible & ~is_ahead))
        return reason

    def put_beats(self, values: Values, offsets: Sequence[int], now_ns: int) -> str | None:
        """Take heartbeats; return why one is not ours, if any is."""
        reason = None
        for beat, offset in zip(self._decoder.records(values), offsets, strict=True):
            try:
                if isinstance(beat, UndecodableError):
                    raise beat
                self.counts.crowded += not self.hosts.heard(beat, offset, beat["ts"] * _MS_NS, now_ns)
            except (RebpfError, MemoryError):  # not about this message
                raise
            except Exception as exc:  # no message may stop its readers
                self.hosts.next = offset + 1
                self.counts.undecodable += 1
                reason = repr(exc)
        return reason

    def _count(self, stream: Stream, records: Columns) -> None:
        if not len(records):
            return
        growth = None
        if stream is FLOWS:
            growth = self._fleet.add(records)
        else:
            # Hosts may share a kernel (nodes that are containers), and a clone of a running machine has its boot id.
            boots = records.hashes[records["boot_id"]] ^ records.hashes[records["host"]]
            is_new = self._ids.add(boots, records["cpu"], records["cpu_seq"], records["ts_ns"])
            self.counts.duplicate += int(np.count_nonzero(~is_new))
            records = records.select(is_new)
        late, crowded = np.zeros((2, len(records)), np.bool_)
        for windows, evaluator in self._rules[stream]:
            added = windows.add(records, growth, evaluator.decided_ns)
            late |= added.late
            crowded |= added.crowded
        self.counts.late += int(np.count_nonzero(late))
        self.counts.crowded += int(np.count_nonzero(crowded))

    def decide(self, reached_ns: int, beats_read_ns: int = 0) -> list[Alert]:
        """Decide all windows that end by `reached_ns`; return the changes.

        All heartbeats up to `beats_read_ns` have been read; 0: unknown.
        """
        changes, self._orphaned = self._orphaned, []
        for _, evaluator in self._all():
            changes += evaluator.decide(reached_ns)
        self.decided_ns = max(self.decided_ns, reached_ns)
        open_ns = min((evaluator.decided_ns for _, evaluator in self._all()), default=reached_ns)
        if open_ns > self._open_ns:  # it costs a pass over all connections
            self._open_ns = open_ns
            self._fleet.forget(open_ns)
            self._ids.forget(open_ns)
        changes = sorted(changes, key=lambda alert: alert.window_start_ns) + self.hosts.changes(beats_read_ns)
        self.counts.alerts += len(changes)
        return changes


def since(rules: Iterable[AlertRule], decided_ns: int, lookback_s: float) -> int:
    """Return the time from which records must be read to decide windows after `decided_ns`."""
    before_s = max(((windows_before(rule) + 1) * rule.window_s for rule in rules), default=0.0)
    return max(0, decided_ns - round((before_s + lookback_s) * 1e9))


def _possible(stream: Stream, records: Columns) -> Mask:
    """Return which records have possible numbers and names."""
    names = [(name, _MOST_COUNT) for name in COUNTERS] + [("srtt_us", _MOST_SEGS)]
    names = names if stream is FLOWS else [("segs", _MOST_SEGS)]
    rate = records["sample_rate"]
    possible: Mask = (records["ts_ns"] >= 0) & (rate > 0) & (rate < (_MOST_RATE if stream is FLOWS else _MOST_SEGS))
    for name, most in [*names, ("sport", 1 << 16), ("dport", 1 << 16)]:
        possible &= (records[name] >= 0) & (records[name] < most)
    lengths = np.array([len(text) for text in records.texts], np.int64)
    if lengths.max(initial=0) > MOST_GROUP // 4:
        possible &= sum(lengths[records[name]] for name in ("host", "saddr", "daddr")) < MOST_GROUP - 32
    return possible
