"""When rings are read, at each load: with the time passed in, so that each read can be counted."""

import math
from collections import deque

import pytest

from producer.pipeline.pace import LEAST_S, Budget, StreamPace

LATENCY_S = 1.0
START_S = 1000.0
REQUEST_ROWS = 5120
WORTHWHILE_ROWS = 4096


def transmits(budget: Budget | None = None, latency_s: float = LATENCY_S) -> StreamPace:
    pace = StreamPace("transmit", latency_s, budget or Budget(), is_urgent=False)
    pace.after_read(START_S, 0, REQUEST_ROWS, more=False)
    return pace


def retransmits(budget: Budget | None = None) -> StreamPace:
    pace = StreamPace("retransmit", LATENCY_S, budget or Budget(), is_urgent=True)
    pace.after_read(START_S, 0, REQUEST_ROWS, more=False)
    return pace


def reads_of(pace: StreamPace, events_per_s: float, seconds: float) -> list[float]:
    """Let events arrive evenly and the ring be read whenever it is due; return the times."""
    times, seen_s = [], START_S
    while pace.due_s < START_S + seconds:
        now_s = pace.due_s
        times.append(now_s)
        pace.after_read(now_s, round((now_s - seen_s) * events_per_s), REQUEST_ROWS, more=False)
        seen_s = now_s
    return times


@pytest.mark.parametrize("events_per_s", [0, 1, 200, 4000])
def test_a_ring_that_a_batch_would_not_fill_is_read_once_per_latency(events_per_s: float) -> None:
    assert len(reads_of(transmits(), events_per_s, 30.5)) == 30


def test_latency_is_a_setting() -> None:
    assert len(reads_of(transmits(latency_s=0.1), 200, 10.05)) == 100


def test_a_busy_ring_is_read_when_it_nearly_fills_a_request() -> None:
    assert len(reads_of(transmits(), 60_000, 20)) == pytest.approx(20 * 60_000 / WORTHWHILE_ROWS, rel=0.05)


def test_a_ring_is_never_read_more_often_than_the_least_time_allows() -> None:
    assert len(reads_of(transmits(), 5_000_000, 20)) <= 20 / LEAST_S + 1


def test_a_ring_with_more_is_read_again_at_once_and_its_rate_counts_all_reads_together() -> None:
    pace = transmits()
    pace.after_read(START_S + 1, WORTHWHILE_ROWS, REQUEST_ROWS, more=True)
    assert pace.due_s == START_S + 1
    pace.after_read(START_S + 1, WORTHWHILE_ROWS, REQUEST_ROWS, more=False)
    assert pace.due_s == pytest.approx(START_S + 1.5)


def test_a_transmit_ring_that_fills_is_read_at_once_and_another_in_its_time() -> None:
    pace = transmits()
    due_s = pace.due_s
    assert not pace.heeds(0.24)
    pace.wake(START_S + 0.1, 0.24)
    assert pace.due_s == due_s
    assert pace.heeds(0.26)
    pace.wake(START_S + 0.1, 0.26)
    assert pace.due_s == START_S + 0.1


def test_a_retransmission_is_read_at_once_but_not_right_after_another() -> None:
    pace = retransmits()
    assert pace.heeds(0.0)
    pace.wake(START_S + 0.3, 0.0)
    assert pace.due_s == START_S + 0.3
    pace.after_read(START_S + 0.3, 1, REQUEST_ROWS, more=False)
    pace.wake(START_S + 0.301, 0.0)
    assert pace.due_s == START_S + 0.3 + LEAST_S
    pace.after_read(pace.due_s, 0, REQUEST_ROWS, more=False)
    assert pace.due_s == START_S + 0.3 + LEAST_S + LATENCY_S


def delays_of(events_per_s: float, retransmits_per_s: float, seconds: float) -> tuple[list[float], int]:
    """Let both streams' events arrive evenly; return how long each retransmission is unread, and the reads with any."""
    budget = Budget()
    transmit, retransmit = transmits(budget), retransmits(budget)
    arrivals = deque(START_S + number / retransmits_per_s for number in range(1, int(seconds * retransmits_per_s)))
    delays: list[float] = []
    reads, seen_s, unread = 0, START_S, list[float]()
    while arrivals or unread:
        now_s = min(transmit.due_s, retransmit.due_s, arrivals[0] if arrivals else math.inf)
        if transmit.due_s == now_s:
            transmit.after_read(now_s, round((now_s - seen_s) * events_per_s), REQUEST_ROWS, more=False)
            seen_s = now_s
        if arrivals and arrivals[0] == now_s:
            unread.append(arrivals.popleft())
            retransmit.wake(now_s, 0.0)
        if retransmit.due_s <= now_s:
            reads += bool(unread)
            retransmit.after_read(now_s, len(unread), REQUEST_ROWS, more=False)
            delays += [now_s - each for each in unread]
            unread = []
    return delays, reads


@pytest.mark.parametrize(("events_per_s", "retransmits_per_s"), [(200, 2), (3_000, 30), (60_000, 600), (60_000, 6_000)])
def test_retransmissions_of_a_hundredth_are_read_within_the_least_time(
    events_per_s: float, retransmits_per_s: float
) -> None:
    delays, _ = delays_of(events_per_s, retransmits_per_s, 30)
    assert max(delays[len(delays) // 10 :]) <= LEAST_S + 1e-6, "once the rate is known"


def test_many_retransmissions_of_a_quiet_host_cost_few_reads_and_none_is_late() -> None:
    delays, reads = delays_of(200, 50, 60)
    assert reads <= 10 + 2.5 * 60
    assert max(delays) <= LATENCY_S


def test_a_retransmit_ring_that_fills_is_read_whatever_the_budget_says() -> None:
    budget = Budget()
    pace = retransmits(budget)
    for _ in range(100):
        budget.spend(START_S)
    pace.wake(START_S, 0.0)
    assert pace.due_s > START_S
    pace.wake(START_S, 0.5)
    assert pace.due_s == START_S


def test_a_read_that_failed_is_repeated_soon() -> None:
    pace = transmits()
    pace.after_failure(START_S)
    assert START_S < pace.due_s < START_S + LATENCY_S / 2
