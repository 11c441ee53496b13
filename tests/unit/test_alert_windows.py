"""The core of alerting: windows of event time, duplicates, lateness, what a restart reads again, and hysteresis."""

import ipaddress
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.alertwindows import Alert, AlertRule, PartitionSums, RuleState, Segments, Sum, segments
from producer.decode import Decoder
from producer.encode import BatchEncoder, load_schema
from producer.errors import ConfigError
from producer.events import RETRANSMITS, Batch, SchemaId

SECOND_NS = 1_000_000_000
RULE = AlertRule("loss", by="host", measure="count", window_s=10, threshold=7, clear=3, lateness_s=5)
RATIO = replace(RULE, measure="ratio", threshold=0.1, clear=0.05, minimum=100)


def event(number: int, second: float, host: str = "web-1", segs: int = 1) -> Segments:
    return Segments(("boot", 0, number), int(second * SECOND_NS), segs, {"host": host})


def test_segments_are_summed_not_events_and_a_window_closes_when_the_lateness_is_over() -> None:
    sums = PartitionSums(RULE)
    for offset, each in enumerate([event(1, 10, segs=5), event(2, 19, segs=2), event(3, 12, "web-2"), event(4, 24.9)]):
        sums.add(each, offset)
    assert list(sums.take()) == []
    sums.add(event(5, 25), 4)
    assert list(sums.take()) == [Sum("loss", 10 * SECOND_NS, "web-1", 7), Sum("loss", 10 * SECOND_NS, "web-2", 1)]
    assert list(sums.take()) == []
    sums.add(event(6, 19.9), 5)
    assert sums.late == 1
    assert sums.position == 3


def test_a_duplicate_counts_once() -> None:
    sums = PartitionSums(RULE)
    for offset, each in enumerate([event(1, 1), event(1, 1), event(2, 2), event(9, 30)]):
        sums.add(each, offset)
    assert [each.segs for each in sums.take()] == [2]


def test_what_was_closed_before_a_takeover_stays_closed_and_is_not_read_again() -> None:
    sums = PartitionSums(RULE, closed_before_ns=100 * SECOND_NS)
    sums.add(event(1, 99), 7)
    assert (sums.late, sums.position, list(sums.take())) == (1, 8, [])


def test_a_record_of_the_topic_counts_its_segments_times_its_sample_rate_for_its_groups() -> None:
    rows = np.zeros(1, RETRANSMITS.dtype)
    segment = rows["s"]
    for side, last in (("saddr", 1), ("daddr", 2)):
        segment["flow"][side] = np.frombuffer(ipaddress.IPv6Address(f"::ffff:10.0.0.{last}").packed, np.uint8)
    segment["flow"]["sport"], segment["flow"]["dport"], segment["flow"]["netns"] = 40_000, 443, 5
    segment["cpu"], segment["cpu_seq"], segment["ts"] = 2, 3, 4
    segment["segs"], segment["sample_rate"] = 3, 10
    host = {"host": "web-1", "boot_id": "boot"}
    encoder = BatchEncoder(RETRANSMITS, load_schema(RETRANSMITS), SchemaId(2), host, lambda _: None)
    record = Decoder(None).decode(encoder.encode(Batch(RETRANSMITS, rows), 0).packed())
    flow = "web-1 5 10.0.0.1:40000>10.0.0.2:443"
    groups = {"host": "web-1", "peer": "10.0.0.2", "flow": flow, "port": "443"}
    assert segments(record) == (("boot", 2, 3), 4, 30, groups)


def test_between_clear_and_threshold_nothing_changes_and_a_window_without_segments_resolves() -> None:
    state = RuleState(RULE)
    changes = [state.close(start, {"web-1": count} if count else {}, {}) for start, count in enumerate([6, 7, 5, 3, 0])]
    assert changes == [[], [Alert("loss", "web-1", 1, True, 7.0)], [], [], [Alert("loss", "web-1", 4, False, 0.0)]]


def test_a_ratio_fires_only_with_enough_segments() -> None:
    state = RuleState(RATIO)
    assert state.close(0, {"web-1": 99}, {"web-1": 99}) == []
    assert state.close(1, {"web-1": 20}, {"web-1": 100}) == [Alert("loss", "web-1", 1, True, 0.2)]
    assert state.close(2, {"web-1": 5}, {"web-1": 100}) == []
    assert state.close(3, {"web-1": 4}, {"web-1": 100}) == [Alert("loss", "web-1", 3, False, 0.04)]


@pytest.mark.parametrize(
    "wrong", [{"by": "cpu"}, {"measure": "sum"}, {"window_s": 0}, {"clear": 8}, {"clear": 0}, {"lateness_s": -1}]
)
def test_a_rule_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="loss"):
        replace(RULE, **wrong)


_EVENTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.sampled_from(["a", "b"])), max_size=60)


def _stream(steps: list[tuple[int, int, str]]) -> list[Segments]:
    """Events whose time goes up, each at most 5 seconds, the lateness, behind the latest."""
    now, made = 100, []
    for number, (forward, back, host) in enumerate(steps):
        now = max(now, now + forward - 5)
        made.append(event(number, now - min(back, 5), host))
    return made


def _ended(made: list[Segments]) -> list[Segments]:
    return [*made, event(-1, 10_000)]


@given(_EVENTS)
def test_within_the_lateness_nothing_is_late_and_sums_are_those_of_a_count_by_hand(
    steps: list[tuple[int, int, str]],
) -> None:
    made, sums, got = _stream(steps), PartitionSums(RULE), []
    for offset, each in enumerate(_ended(made)):
        sums.add(each, offset)
        got += sums.take()
    by_hand = Counter((each.ts_ns // SECOND_NS // 10 * 10 * SECOND_NS, each.groups["host"]) for each in made)
    assert {(each.start_ns, each.group): each.segs for each in got} == by_hand
    assert sums.late == 0


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["a", "b"])), max_size=60), st.integers(0, 60))
def test_who_takes_over_makes_the_sums_that_are_left_also_with_late_events(
    given_events: list[tuple[int, str]], crash: int
) -> None:
    whole = _ended([event(number, second, host) for number, (second, host) in enumerate(given_events)])
    undisturbed = _taken(PartitionSums(RULE), whole, 0)
    first = PartitionSums(RULE)
    before = _taken(first, whole[:crash], 0)
    second = PartitionSums(RULE, first.closed_before_ns)
    assert before + _taken(second, whole, min(first.position, len(whole) - 1)) == undisturbed


def _taken(sums: PartitionSums, events: list[Segments], position: int) -> list[Sum]:
    taken = []
    for offset in range(position, len(events)):
        sums.add(events[offset], offset)
        taken += sums.take()
    return taken
