"""A step that fails does not stop the loop, unless it is vital."""

from collections.abc import Callable, Sequence

import pytest

from producer.agent.supervise import StuckError, Supervisor
from producer.health import metrics


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(supervisor: Supervisor, clock: Clock, steps: Sequence[Callable[[], int]]) -> None:
    """Attempt a step each second."""
    for step in steps:
        supervisor.attempt("pipeline", step, 0, vital=True)
        clock.now_s += 1


def fail() -> int:
    raise FileNotFoundError(2, "No such file or directory", "/run/x")


def test_a_step_that_fails_is_tried_again_and_others_go_on() -> None:
    clock = Clock()
    supervisor = Supervisor(clock)
    assert supervisor.attempt("look", fail, 0) == 0
    assert supervisor.attempt("other", lambda: 3, 0) == 3
    assert supervisor.reasons == ["look: FileNotFoundError: [Errno 2] No such file or directory: '/run/x'"]
    assert supervisor.attempt("look", lambda: 4, 0) == 0  # not yet
    clock.now_s += 1
    assert supervisor.attempt("look", lambda: 4, 0) == 4
    assert supervisor.reasons == []


def test_a_vital_step_that_fails_for_a_minute_ends_the_loop() -> None:
    clock = Clock()
    supervisor = Supervisor(clock)
    with pytest.raises(StuckError, match="pipeline has failed"):
        run(supervisor, clock, [fail] * 70)
    assert 159 <= clock.now_s <= 170


def test_a_vital_step_that_works_now_and_then_goes_on() -> None:
    clock = Clock()
    supervisor = Supervisor(clock)
    run(supervisor, clock, [*[fail] * 20, *[int] * 10] * 20)


def test_a_step_that_takes_long_is_measured_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    before = steps_over_2_s()

    def hang() -> int:
        clock.now_s += 3.5
        raise FileNotFoundError

    Supervisor(clock).attempt("look", hang, 0)
    Supervisor(clock).attempt("other", int, 0)
    assert "slow step step=look seconds=3.5" in caplog.messages
    assert steps_over_2_s() == before + 1


def steps_over_2_s() -> float:
    found = metrics.registry(lambda: None, lambda: 0.0)
    total, quick = (
        found.get_sample_value("rebpf_step_seconds_bucket", {"le": bound}) or 0.0 for bound in ("+Inf", "2.0")
    )
    return total - quick
