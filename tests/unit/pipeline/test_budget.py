"""The budget for transmits: one step up is enough, the way down is slow, and a steady load changes nothing."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from producer.pipeline.budget import MOST_RATE, TransmitBudget

loads = st.floats(0, 1e7)
budgets = st.integers(1, 10**6)


class Host:
    """Transmits that arrive evenly, in a time that passes second by second."""

    def __init__(self, events_per_s: int) -> None:
        self.budget = TransmitBudget(events_per_s)
        self.now_s = 100.0
        self.passed = 0.0
        assert self.budget.follow(self.now_s, 0)

    def second(self, load: float) -> None:
        self.passed += load / self.budget.rate
        self.now_s += 1
        assert self.budget.follow(self.now_s, round(self.passed)) == bool(self.budget.events_per_s)

    def seconds(self, load: float, count: int) -> list[int]:
        """Return the rates."""
        rates = []
        for _ in range(count):
            self.second(load)
            rates.append(self.budget.rate)
        return rates


@given(budgets, st.lists(st.tuples(loads, st.integers(1, 50)), max_size=20))
def test_the_rate_is_a_power_of_two_and_falls_by_half(events_per_s: int, phases: Iterable[tuple[float, int]]) -> None:
    host = Host(events_per_s)
    before = 1
    for load, count in phases:
        for rate in host.seconds(load, count):
            assert 1 <= rate <= MOST_RATE
            assert rate & (rate - 1) == 0
            assert rate >= before // 2
            before = rate


@given(budgets, loads, loads)
def test_a_steady_load_gets_a_rate_that_fits_and_keeps_it(events_per_s: int, load: float, earlier: float) -> None:
    host = Host(events_per_s)
    host.seconds(earlier, 30)
    settled = host.seconds(load, 800)[-1]
    assert set(host.seconds(load, 100)) == {settled}
    assert load / settled <= 1.1 * events_per_s + 1 or settled == MOST_RATE
    assert settled == 1 or 2 * load / settled > 0.8 * events_per_s - 2, "half the rate would do"


@given(budgets, st.floats(2.1, 1000), loads)
def test_a_flood_is_within_the_budget_after_a_second(events_per_s: int, times: float, earlier: float) -> None:
    host = Host(events_per_s)
    host.seconds(earlier, 40)
    flood = (times * events_per_s + 2) * host.budget.rate
    host.second(flood)
    assert flood / host.budget.rate <= 1.1 * events_per_s + 1 or host.budget.rate == MOST_RATE


def test_the_rate_falls_after_half_a_minute_and_not_before() -> None:
    host = Host(1000)
    assert host.seconds(60_000, 5)[-1] == 64
    rates = host.seconds(3_000, 200)
    assert set(rates[:29]) == {64}
    assert list(dict.fromkeys(rates)) == [64, 32, 16, 8, 4]


def test_each_second_is_another_turn() -> None:
    host = Host(1000)
    turns = []
    for _ in range(5):
        host.second(10)
        turns.append(host.budget.turn)
    assert turns == [1, 2, 3, 4, 5]
    assert not host.budget.follow(host.now_s + 0.1, round(host.passed) + 10**6), "calls in between change nothing"
    assert (host.budget.turn, host.budget.rate) == (5, 1)


def test_without_a_budget_only_the_rate_of_an_earlier_process_is_replaced() -> None:
    host = Host(0)
    assert set(host.seconds(1e6, 20)) == {1}


def test_a_budget_that_is_lifted_takes_back_the_rate_and_another_one_starts_from_it() -> None:
    host = Host(1000)
    assert host.seconds(60_000, 5)[-1] == 64
    host.budget.set(500)
    host.second(60_000)
    assert host.budget.rate == 64
    assert host.seconds(60_000, 60)[-1] == 128
    host.budget.set(0)
    assert host.budget.follow(host.now_s + 1, round(host.passed)), "the kernel gets it"
    assert host.budget.rate == 1
