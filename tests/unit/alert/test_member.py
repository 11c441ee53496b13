"""Both stages together: the alerts do not depend on the assignment, or on when a member is killed."""

import pickle
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.alert import sums_topic
from producer.alert.commit import Assigned, CommitStep, PartitionId
from producer.alert.evaluate import RETRANSMITS, TRANSMITS, Decider
from producer.alert.model import Alert
from producer.alert.partitions import Committed, Counts, EventPartition, Partition, SumsPartition
from producer.alert.windows import GROUPS, Grouping, Sums
from producer.config.load import AlertRule
from producer.consume.columns import Columns
from producer.consume.decode import Rejected
from producer.consume.plan import Fields
from tests.support.batches import columns_of

SECOND_NS = 1_000_000_000
LATENESS_S = 2
COUNT = AlertRule(name="count", by="host", measure="count", window_s=10, threshold=7, clear=3, minimum=1)
RATIO = AlertRule(name="ratio", by="peer", measure="ratio", window_s=5, threshold=0.5, clear=0.2, minimum=3)
RULES = (COUNT, RATIO)
HOSTS = Grouping("host", 10 * SECOND_NS)


def fields_of(alerts: Sequence[Alert]) -> list[tuple[str, bool, int, float]]:
    return [(each.group, each.firing, each.window_start_ns // SECOND_NS, each.value) for each in alerts]


class Deciding:
    """A Decider of one rule and one source: gets a window's sums, then the watermark at its end."""

    def __init__(self, rule: AlertRule, known: Sequence[Alert] = (), decided_ns: int = 0) -> None:
        self.decider = Decider([rule], ["r/0"], known, 0, decided_ns)
        self._width_s = int(rule.window_s)
        self._view = Grouping(rule.by, self._width_s * SECOND_NS)

    def window(self, number: int, again: dict[str, int], total: dict[str, int] | None = None) -> list[Any]:
        start_ns = number * self._width_s * SECOND_NS
        for stream, segs in ((RETRANSMITS, again), (TRANSMITS, total or {})):
            if segs:
                self.decider.add(stream, "r/0", Sums(self._view, start_ns, segs), self.decider.next)
        self.decider.advance("r/0", start_ns + self._width_s * SECOND_NS, self.decider.next)
        return fields_of(self.decider.decide())


def test_between_clear_and_threshold_nothing_changes_and_a_window_without_segments_resolves() -> None:
    deciding = Deciding(COUNT)
    changes = [deciding.window(number, {"a": count} if count else {}) for number, count in enumerate([6, 7, 5, 3, 0])]
    assert changes == [[], [("a", True, 10, 7)], [], [], [("a", False, 40, 0)]]
    assert deciding.decider.firing == []


def test_a_ratio_fires_only_with_enough_segments() -> None:
    deciding = Deciding(RATIO)
    assert deciding.window(0, {"a": 2}, {"a": 2}) == []
    assert deciding.window(1, {"a": 2}, {"a": 4}) == [("a", True, 5, 0.5)]
    assert deciding.window(2, {"a": 1}, {"a": 5}) == []
    assert deciding.window(3, {"a": 1}, {"a": 6}) == [("a", False, 15, pytest.approx(1 / 6))]


def test_an_alert_says_since_when_and_of_how_many_segments() -> None:
    decider = Deciding(COUNT)
    decider.window(3, {"a": 9})
    assert decider.decider.firing == [
        Alert("count", "host", "a", True, "count", 9, 7, 3, 30 * SECOND_NS, 10, 0, 9, 30 * SECOND_NS)
    ]
    resolved = Deciding(COUNT, decider.decider.firing)
    resolved.decider.advance("r/0", 100 * SECOND_NS, 0)
    assert [(each.window_start_ns, each.since_ns) for each in resolved.decider.decide()] == [
        (40 * SECOND_NS, 30 * SECOND_NS)
    ]


def test_a_window_waits_for_all_partitions_and_sums_that_come_again_replace_the_first() -> None:
    decider = Decider([COUNT], ["r/0", "r/1"], [], 5)
    for offset, (part, segs) in enumerate([("r/0", 4), ("r/1", 4), ("r/0", 4)], 5):
        decider.add(RETRANSMITS, part, Sums(HOSTS, 0, {"a": segs}), offset)
    decider.advance("r/0", 50 * SECOND_NS, 8)
    assert decider.decide() == []
    assert (decider.next, decider.position) == (9, 5)
    decider.advance("r/1", 10 * SECOND_NS, 9)
    assert fields_of(decider.decide()) == [("a", True, 0, 8)]
    assert (decider.position, decider.decided_ns) == (10, 10 * SECOND_NS)


def test_what_was_sent_is_not_sent_again_nor_undone_by_windows_before_it() -> None:
    fired = Deciding(COUNT)
    fired.window(3, {"a": 9})
    again = Deciding(COUNT, fired.decider.firing)
    changes = [again.window(number, {"a": count}) for number, count in enumerate([9, 1, 9, 9, 1])]
    assert changes == [[], [], [], [], [("a", False, 40, 1)]]


def test_groups_that_are_resolved_take_no_memory() -> None:
    deciding, without = Deciding(COUNT), Deciding(COUNT)
    deciding.window(0, {f"host-{number}": 9 for number in range(1000)})
    assert len(deciding.window(1, {})) == 1000
    without.window(1, {})
    assert len(pickle.dumps(deciding.decider)) == len(pickle.dumps(without.decider))


def test_an_alert_whose_rule_is_gone_is_resolved() -> None:
    known = Deciding(COUNT)
    known.window(3, {"a": 9})
    for rule in (RATIO, AlertRule(name="count", by="peer", measure="count", window_s=10, threshold=7, clear=3)):
        assert Deciding(rule, known.decider.firing).window(9, {}) == [("a", False, 30, 9)]


class _Killed(Exception):
    pass


class _AsItIs:
    """A decoder for values that are records already."""

    def columns(self, values: Any, fields: Fields) -> tuple[Columns, list[Rejected]]:
        return columns_of(values), []


class World:
    """The state that survives members: topics and offsets. A member is killed after `life` actions."""

    def __init__(self, logs: dict[PartitionId, list[dict[str, Any]]], sums: int) -> None:
        self.logs = logs
        self.sums: dict[PartitionId, list[bytes]] = {PartitionId("sums", number): [] for number in range(sums)}
        self.places = [*logs, *self.sums]
        self.committed: dict[PartitionId, Committed] = {}
        self.alerts: list[Alert] = []
        self.pager: list[Alert] = []
        self.life: int | None = None
        self.end_ns = 1_000 * SECOND_NS
        self.members: list[dict[PartitionId, Partition]] = []
        self.share(dict.fromkeys(self.places, 0))

    def share(self, owners: dict[PartitionId, int]) -> None:
        """Rebalance: all members start from the committed state."""
        known = {alert.key: alert for alert in self.alerts}
        self.members = [{}, {}]
        for partition_id in self.places:
            self.members[owners[partition_id]][partition_id] = self._partition(partition_id, known.values())

    def read(self, partition_id: PartitionId, count: int) -> None:
        (parts,) = (parts for parts in self.members if partition_id in parts)
        part, log = parts[partition_id], self.logs.get(partition_id) or self.sums.get(partition_id, [])
        offsets = np.arange(part.next, min(part.next + count, len(log)))
        if len(offsets):
            part.put([log[offset] for offset in offsets], offsets, self.end_ns)  # type: ignore[misc]  # records, not bytes
        if partition_id in self.logs:
            part.until = (len(log), self.end_ns)

    def cycle(self, member: int, life: int | None = None) -> None:
        self.life = life
        try:
            CommitStep(self, len(self.sums), [_Pager(self), _Topic(self)], self.commit).run(self.members[member])
        except _Killed:
            self.share(dict.fromkeys(self.places, 1 - member))

    def act(self) -> None:
        if self.life is not None:
            self.life -= 1
            if self.life < 0:
                raise _Killed

    def put(self, partition: int, value: bytes) -> None:
        self.act()
        self.sums[PartitionId("sums", partition)].append(value)

    def flush(self) -> None:
        pass

    def commit(self, parts: Assigned) -> None:
        for partition_id, part in parts.items():
            self.act()
            self.committed[partition_id] = part.committed()

    def _partition(self, partition_id: PartitionId, known: Collection[Alert]) -> Partition:
        committed = self.committed.get(partition_id, Committed(0))
        if partition_id.topic == "sums":
            count = len(self.sums)
            ours = [
                each for each in known if sums_topic.partition_of(each.by, each.group, count) == partition_id.number
            ]
            return SumsPartition("sums", RULES, [_name(each) for each in self.logs], ours, committed, Counts())
        rules = [rule for rule in RULES if partition_id.topic == RETRANSMITS or rule.measure == "ratio"]
        return EventPartition(
            partition_id.topic, partition_id.topic, _name(partition_id), rules, LATENESS_S, committed,
            _AsItIs(), Counts(),  # type: ignore[arg-type]
        )  # fmt: skip


class _Pager:
    """A sink that may receive alerts twice."""

    def __init__(self, world: World) -> None:
        self._world = world

    def send(self, alerts: Sequence[Alert]) -> None:
        self._world.act()
        self._world.pager += alerts

    def repeat(self, firing: Collection[Alert]) -> None:
        pass

    def close(self) -> None:
        pass


class _Topic(_Pager):
    def send(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self._world.act()
            self._world.alerts.append(alert)


def _name(partition_id: PartitionId) -> str:
    return f"{partition_id.topic}/{partition_id.number}"


def reference(logs: dict[PartitionId, list[dict[str, Any]]]) -> list[tuple[str, str, bool, int, float]]:
    """Return the changes, from one pass over all events."""
    events = {
        (partition_id.topic, each["boot_id"], each["cpu_seq"]): (partition_id.topic, each)
        for partition_id, log in logs.items()
        for each in log
    }
    changes = []
    for rule in RULES:
        sums: dict[tuple[str, int, str], int] = defaultdict(int)
        for topic, each in events.values():
            start_s = each["ts_ns"] // SECOND_NS // int(rule.window_s) * int(rule.window_s)
            sums[topic, start_s, GROUPS[rule.by](each)] += each["segs"]
        for group in {group for _, _, group in sums}:
            firing = False
            for start_s in range(0, 200, int(rule.window_s)):
                again, total = sums[RETRANSMITS, start_s, group], sums[TRANSMITS, start_s, group]
                value = min(1.0, again / max(1, total)) if rule.measure == "ratio" else again
                enough = (total if rule.measure == "ratio" else again) >= rule.minimum
                if value < rule.clear if firing else enough and value >= rule.threshold:
                    firing = not firing
                    changes.append((rule.name, group, firing, start_s, value))
    return sorted(changes)


def changes(alerts: Sequence[Alert]) -> list[tuple[str, str, bool, int, float]]:
    return sorted((each.rule, *fields) for each, fields in zip(alerts, fields_of(alerts), strict=True))


SOURCES = [PartitionId(RETRANSMITS, 0), PartitionId(RETRANSMITS, 1), PartitionId(TRANSMITS, 0)]
_EVENT = st.tuples(st.sampled_from(SOURCES), st.integers(0, 4), st.sampled_from("abc"), st.integers(1, 5))
_STEP = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 4), st.integers(1, 20)),
    st.tuples(st.just("cycle"), st.integers(0, 1), st.none() | st.integers(0, 25)),
    st.tuples(st.just("share"), st.lists(st.integers(0, 1), min_size=5, max_size=5), st.none()),
)


@given(
    st.lists(_EVENT, min_size=5, max_size=60), st.lists(st.integers(0, 59), max_size=5), st.lists(_STEP, max_size=40)
)
def test_the_alerts_are_those_of_one_count_whoever_reads_and_wherever_a_member_is_killed(
    given_events: list[Any], copies: list[int], steps: list[Any]
) -> None:
    logs: dict[PartitionId, list[dict[str, Any]]] = {partition_id: [] for partition_id in SOURCES}
    at_ns = SECOND_NS
    made = []
    for number, (partition_id, forward, name, segs) in enumerate(given_events):
        at_ns += forward * SECOND_NS
        made.append((partition_id, {
            "ts_ns": at_ns, "host": name, "boot_id": "boot", "cpu": 0, "cpu_seq": number, "saddr": "10.0.0.1",
            "sport": 1, "daddr": f"192.0.2.{segs % 2}", "dport": 2, "segs": segs, "sample_rate": 1,
        }))  # fmt: skip
        logs[partition_id].append(made[-1][1])
    for partition_id, each in (made[copy] for copy in copies if copy < len(made)):
        at = next(i for i, other in enumerate(logs[partition_id]) if other is each)
        logs[partition_id].insert(min(at + 2, len(logs[partition_id])), each)
    expected = reference(logs)
    world = World(logs, sums=2)

    for kind, which, how in steps:
        if kind == "read":
            world.read(world.places[which], how)
        elif kind == "cycle":
            world.cycle(which, how)
        else:
            world.share(dict(zip(world.places, which, strict=True)))
    for _ in range(2):  # the second reads what the first wrote
        for partition_id in world.places:
            world.read(partition_id, 10_000)
        world.cycle(0)
        world.cycle(1)

    assert changes(world.alerts) == expected
    assert set(changes(world.pager)) == set(expected)
