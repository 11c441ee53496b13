"""Sums in windows of event time: duplicates, lateness, restarts, and the topic between the stages."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.alert.sums_topic import PartitionSums, partition_of, read, sums_messages
from producer.alert.windows import GROUPS, Grouping, Outcome, SourceSums, Sums
from tests.support.batches import add_events
from tests.support.records import SECOND_NS, event

LATENESS_NS = 5 * SECOND_NS
TENS = Grouping("host", 10 * SECOND_NS)
BY_PEER = Grouping("peer", 20 * SECOND_NS)
NOW_NS = 1_000 * SECOND_NS


def source(first: int = 0, watermark_ns: int = 0, *groupings: Grouping) -> SourceSums:
    return SourceSums(groupings or [TENS], LATENESS_NS, first, watermark_ns)


def added(sums: SourceSums, *events: dict[str, Any]) -> list[Outcome]:
    return add_events(sums, events, sums.next, NOW_NS)


def test_segments_are_summed_not_events_and_a_window_closes_when_the_lateness_is_over() -> None:
    sums = source()
    added(sums, event(1, 10, segs=5), event(2, 19, segs=2), event(3, 12, "web-2"), event(4, 24.9))
    assert sums.take() == []
    added(sums, event(5, 25))
    assert sums.take() == [Sums(TENS, 10 * SECOND_NS, {"web-1": 7, "web-2": 1})]
    assert sums.take() == []
    assert added(sums, event(6, 19.9)) == [Outcome.LATE]
    assert sums.position == 3


def test_a_sampled_event_stands_for_all_that_it_was_taken_from() -> None:
    sums = source()
    added(sums, event(1, 10, segs=3, sample_rate=10), event(2, 25))
    assert sums.take()[0].segs == {"web-1": 30}


def test_a_duplicate_counts_once_also_when_the_clock_was_corrected_between() -> None:
    sums = source()
    outcomes = added(sums, event(1, 9.999), event(1, 9.999), event(1, 10.001), event(2, 12), event(9, 30))
    assert outcomes == [Outcome.COUNTED, Outcome.DUPLICATE, Outcome.DUPLICATE, Outcome.COUNTED, Outcome.COUNTED]
    assert [each.segs for each in sums.take()] == [{"web-1": 1}, {"web-1": 1}]


def test_windows_of_different_widths_are_summed_side_by_side() -> None:
    sums = source(0, 0, TENS, BY_PEER)
    added(sums, event(1, 1), event(2, 11, "web-2", daddr="192.0.2.2"), event(3, 25))
    assert sums.take() == [
        Sums(TENS, 0, {"web-1": 1}),
        Sums(TENS, 10 * SECOND_NS, {"web-2": 1}),
        Sums(BY_PEER, 0, {"192.0.2.1": 1, "192.0.2.2": 1}),
    ]


def test_a_partition_in_which_nothing_comes_closes_its_windows_when_it_is_read_to_its_end() -> None:
    sums = source()
    added(sums, event(1, 12))
    sums.read_to_end(24 * SECOND_NS)
    assert sums.take() == []
    sums.read_to_end(25 * SECOND_NS)
    assert sums.take() == [Sums(TENS, 10 * SECOND_NS, {"web-1": 1})]


def test_a_clock_that_is_ahead_closes_no_window_of_others() -> None:
    sums = source()
    outcomes = add_events(sums, [event(1, 12), event(2, 60), event(3, 10_000), event(4, 13)], 0, 20 * SECOND_NS)
    assert outcomes == [Outcome.COUNTED, Outcome.COUNTED, Outcome.AHEAD, Outcome.COUNTED]
    assert sums.watermark_ns == 15 * SECOND_NS


def test_what_was_closed_before_a_takeover_stays_closed_and_is_not_read_again() -> None:
    sums = source(7, 100 * SECOND_NS)
    assert added(sums, event(1, 99)) == [Outcome.LATE]
    assert (sums.position, sums.take()) == (8, [])


@pytest.mark.parametrize(
    ("by", "group"),
    [("host", "web-1"), ("peer", "2001:db8::3"), ("flow", "web-1 10.0.0.1:40000>[2001:db8::3]:443"), ("port", "443")],
)
def test_an_event_belongs_to_one_group_of_each_kind(by: str, group: str) -> None:
    assert GROUPS[by](event(1, 1, daddr="2001:db8::3")) == group


def test_sums_go_to_their_groups_partitions_in_messages_that_are_not_too_large() -> None:
    sums = Sums(TENS, 10 * SECOND_NS, {f"host-{number}": number for number in range(5_000)})
    got: dict[str, int] = {}
    for partition, message in sums_messages("retransmits", "tcp_retransmit/3", sums, 4):
        assert len(message) < 100_000
        parsed = read(message)
        assert isinstance(parsed, PartitionSums)
        assert (parsed.source, parsed.stream, *parsed.sums[:2]) == ("tcp_retransmit/3", "retransmits", *sums[:2])
        assert {partition_of("host", group, 4) for group in parsed.sums.segs} == {partition}
        got |= parsed.sums.segs
    assert got == sums.segs


_EVENTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.sampled_from(["a", "b"])), max_size=60)


def _stream(steps: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """Events with increasing times, each at most 5 seconds (the lateness) before the latest."""
    now, made = 100, []
    for number, (forward, back, host) in enumerate(steps):
        now = max(now, now + forward - 5)
        made.append(event(number, now - min(back, 5), host))
    return made


def _taken(sums: SourceSums, events: list[dict[str, Any]]) -> list[Sums]:
    taken = []
    for offset in range(sums.next, len(events)):
        add_events(sums, [events[offset]], offset, 10_000 * SECOND_NS)
        taken += sums.take()
    return taken


@given(_EVENTS)
def test_within_the_lateness_nothing_is_late_and_sums_are_those_of_a_count_by_hand(
    steps: list[tuple[int, int, str]],
) -> None:
    made = _stream(steps)
    got = _taken(source(), [*made, event(-1, 10_000)])
    by_hand = Counter((each["ts_ns"] // TENS.width_ns * TENS.width_ns, each["host"]) for each in made)
    assert {(each.start_ns, group): segs for each in got for group, segs in each.segs.items()} == by_hand


_ANY_EVENTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(-3, 90), st.sampled_from(["a", "b", "c" * 3000]), st.integers(-1, 3)),
    max_size=40,
)


@given(_ANY_EVENTS, st.lists(st.integers(1, 9), max_size=20))
def test_outcomes_and_sums_do_not_depend_on_how_events_are_batched(
    given_events: list[tuple[int, int, str, int]], sizes: list[int]
) -> None:
    made = [event(number, second, host, segs=segs) for number, second, host, segs in given_events]
    single, batched = source(0, 0, TENS, BY_PEER), source(0, 0, TENS, BY_PEER)
    expected = [outcome for each in made for outcome in added(single, each)]
    found: list[Outcome] = []
    for size in [*sizes, len(made)]:
        found += added(batched, *made[len(found) : len(found) + size])
    assert found == expected
    assert (batched.next, batched.watermark_ns, batched.take()) == (single.next, single.watermark_ns, single.take())


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["a", "b"])), max_size=60), st.integers(0, 60))
def test_who_takes_over_makes_the_sums_that_are_left_also_with_late_events(
    given_events: list[tuple[int, str]], crash: int
) -> None:
    made = [event(number, second, host) for number, (second, host) in enumerate(given_events)]
    whole = [*made, event(-1, 10_000)]
    undisturbed = _taken(source(0, 0, TENS, BY_PEER), whole)
    first = source(0, 0, TENS, BY_PEER)
    before = _taken(first, whole[:crash])
    second = source(first.position, first.watermark_ns, TENS, BY_PEER)
    assert sorted(map(repr, before + _taken(second, whole))) == sorted(map(repr, undisturbed))
