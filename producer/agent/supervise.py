"""Supervises the loop's steps: a step that fails is counted, logged and retried, and the others continue.

Each step is timed, and slow ones are logged.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from producer.errors import RebpfError
from producer.health import metrics
from producer.host.log_limit import LogLimit

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Other = TypeVar("Other")

_FIRST_WAIT_S = 0.1
_MAX_WAIT_S = 5.0
_STUCK_S = 60.0
_REPEAT_S = 60.0
_SLOW_S = 1.0
_PACE_MIN_S = 0.5
_PACE_MAX_S = 5.0
_PACE_SHARE = 0.2


class StuckError(RebpfError):
    """A vital step has failed for too long."""


class _Failing:
    """A failing step: since when, and when to retry it."""

    def __init__(self, now_s: float) -> None:
        self.since_s = now_s
        self.wait_s = _FIRST_WAIT_S
        self.retry_at_s = 0.0
        self.error = ""


class Supervisor:
    """Runs steps by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failing: dict[str, _Failing] = {}
        self._log_limit = LogLimit(_REPEAT_S, clock)

    @property
    def reasons(self) -> list[str]:
        """The failing steps, each with its error."""
        return [f"{step}: {failing.error}" for step, failing in self._failing.items()]

    def attempt(
        self, step: str, work: Callable[[], Result], otherwise: Other, *, vital: bool = False
    ) -> Result | Other:
        """Run a step and return its result, or `otherwise` if it fails or its retry is not due.

        Raises StuckError if a vital step has failed for a minute.
        """
        failing = self._failing.get(step)
        if failing and self._clock() < failing.retry_at_s:
            return otherwise
        began_s = self._clock()
        try:
            result = work()
        except StuckError:  # from a nested step
            raise
        except Exception as error:
            self._note(step, error, vital=vital)
            return otherwise
        finally:
            self._measure(step, self._clock() - began_s)
        if failing:
            del self._failing[step]
            self._log_limit.forget(step)
            logger.info("step recovered step=%s", step)
        return result

    def _measure(self, step: str, seconds: float) -> None:
        """Record how long a step took: it blocks the rest of the loop."""
        metrics.STEPS.observe(seconds)
        if seconds >= _SLOW_S:
            logger.warning("slow step step=%s seconds=%.1f", step, seconds)

    def _note(self, step: str, error: Exception, *, vital: bool) -> None:
        now_s = self._clock()
        failing = self._failing.setdefault(step, _Failing(now_s))
        failing.error = f"{type(error).__name__}: {error}"[:200]
        metrics.step_failed(step)
        if vital and now_s - failing.since_s >= _STUCK_S:
            raise StuckError(f"{step} has failed for {_STUCK_S:.0f} s: {failing.error}") from error
        if self._log_limit.allows(step):
            logger.warning("step failed step=%s error=%s", step, failing.error, exc_info=vital)
        failing.retry_at_s = self._clock() + failing.wait_s
        failing.wait_s = min(2 * failing.wait_s, _MAX_WAIT_S)


class Pace:
    """Limits how often work is done and the share of time that it takes, at any rate of requests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._may_run_s = 0.0

    def is_due(self) -> bool:
        """Whether the work may be done now."""
        return self._clock() >= self._may_run_s

    def run(self, work: Callable[[], None]) -> None:
        """Do the work, and schedule the earliest next time by how long it took."""
        begin_s = self._clock()
        try:
            work()
        finally:
            end_s = self._clock()
            wait_s = (end_s - begin_s) * (1 / _PACE_SHARE - 1)
            self._may_run_s = end_s + min(max(wait_s, _PACE_MIN_S), _PACE_MAX_S)
