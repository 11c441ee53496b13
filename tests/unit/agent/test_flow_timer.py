"""Reports of open connections: once in each interval, in steps, and never while the ring has no space."""

from collections.abc import Generator

import pytest

from producer.agent.flow_timer import FlowTimer

INTERVAL_S = 10.0


class Reports:
    """Reports of three steps each; `steps` has those that were taken, as numbers of report and step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.fill = 0.0
        self.begun = self.ended = 0
        self.fails = False

    def report(self) -> Generator[None]:
        self.begun += 1
        number = self.begun
        try:
            for step in (1, 2, 3):
                if self.fails:
                    raise OSError("a defect")
                self.steps.append((number, step))
                yield
        finally:
            self.ended += 1

    def timer(self, host: str = "web-17", now_s: float = 1000.0) -> FlowTimer:
        return FlowTimer(self.report, lambda: self.fill, INTERVAL_S, host, now_s)


@pytest.fixture
def reports() -> Reports:
    return Reports()


def run_due(timer: FlowTimer, now_s: float) -> int:
    """Take the steps that are due, and return how many there were."""
    count = 0
    while timer.due_s <= now_s:
        timer.step(now_s)
        count += 1
    return count


def test_another_interval_counts_from_the_last_report(reports: Reports) -> None:
    timer = reports.timer()
    first_s = timer.due_s
    run_due(timer, first_s)
    timer.set_interval(2.0)
    assert timer.due_s == first_s + 2.0, "not when the interval before would have been over"
    run_due(timer, first_s + 2.0)
    assert timer.due_s == first_s + 4.0


def test_each_interval_has_one_report_in_steps(reports: Reports) -> None:
    timer = reports.timer()
    first_s = timer.due_s
    timer.step(first_s)
    assert reports.steps == [(1, 1)], "one step at a time"
    assert timer.due_s <= first_s, "the next step is due at once"
    run_due(timer, first_s)
    assert reports.steps == [(1, 1), (1, 2), (1, 3)]
    assert timer.due_s == first_s + INTERVAL_S
    assert run_due(timer, first_s + INTERVAL_S - 0.001) == 0
    run_due(timer, first_s + INTERVAL_S)
    assert reports.steps[3:] == [(2, 1), (2, 2), (2, 3)]


def test_the_hosts_of_a_fleet_spread_over_the_interval(reports: Reports) -> None:
    first = sorted(reports.timer(f"web-{number}").due_s - 1000.0 for number in range(1009))
    assert 0 <= first[0] < first[-1] < INTERVAL_S
    for quarter in range(4):
        inside = [each for each in first if quarter <= each / INTERVAL_S * 4 < quarter + 1]
        assert 200 < len(inside) < 310
    assert reports.timer("web-1").due_s == reports.timer("web-1").due_s, "the same at each start"


def test_intervals_that_passed_meanwhile_are_not_made_up_for(reports: Reports) -> None:
    timer = reports.timer()
    first_s = timer.due_s
    run_due(timer, first_s + 3.5 * INTERVAL_S)
    assert reports.begun == 1
    assert timer.due_s == first_s + 4 * INTERVAL_S


def test_no_step_is_taken_while_the_ring_is_more_than_half_full(reports: Reports) -> None:
    timer = reports.timer()
    timer.step(timer.due_s)
    reports.fill = 0.51
    timer.step(timer.due_s)
    timer.step(timer.due_s)
    assert reports.steps == [(1, 1)]
    reports.fill = 0.5
    timer.step(timer.due_s)
    assert reports.steps == [(1, 1), (1, 2)]


def test_after_an_error_the_next_interval_has_a_report(reports: Reports) -> None:
    timer = reports.timer()
    first_s = timer.due_s
    reports.fails = True
    with pytest.raises(OSError, match="a defect"):
        timer.step(first_s)
    assert timer.due_s == first_s + INTERVAL_S
    reports.fails = False
    run_due(timer, first_s + INTERVAL_S)
    assert reports.steps == [(2, 1), (2, 2), (2, 3)]


def test_a_report_that_is_under_way_ends_at_a_stop(reports: Reports) -> None:
    timer = reports.timer()
    timer.step(timer.due_s)
    timer.close()
    assert (reports.begun, reports.ended) == (1, 1)
