"""Runs a target: a bounded number of fixed examples, or others for a given time."""

import resource
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz.known import KNOWN

_ROUND = 200
"""Examples between two checks of the clock."""
_MOST_BYTES = 1 << 28
"""How much memory one example may add to this process."""

Check = Callable[[Any], None]


class FindingError(AssertionError):
    """An example broke the property: a traceback, an undocumented exit code, a hang, or too much memory."""


@dataclass(frozen=True, slots=True)
class Target:
    """A fuzz target. `checks` is entered once per run and returns the function that checks an example."""

    name: str
    examples: SearchStrategy[Any]
    checks: Callable[[], AbstractContextManager[Check]]
    count: int = 100
    """Number of examples in the default tests."""
    bound_s: float = 10.0
    """Time limit of one example."""


@dataclass(slots=True)
class Tally:
    """The counts of a run."""

    executions: int = 0
    known: dict[str, int] = field(default_factory=dict)


def run_fixed(target: Target) -> None:
    """Run the target's fixed examples; raise an example's error, unless it is known."""
    tally = Tally()
    with target.checks() as check:
        _property(target, check, tally, target.count, derandomize=True)()


def run_for(target: Target, seconds: float, first_seed: int) -> tuple[Tally, BaseException | None]:
    """Run other examples for a time, or until one fails; return the tally and the error."""
    tally, end, number = Tally(), time.monotonic() + seconds, first_seed
    with target.checks() as check, _alarm():
        while time.monotonic() < end:
            try:
                seed(number)(_property(target, check, tally, min(_ROUND, target.count * 4), derandomize=False))()
            except Exception as finding:
                return tally, finding
            number += 1
    return tally, None


def signature(error: BaseException) -> str:
    """Return an error's type and the innermost function of ours that it passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/producer/" in frame.filename]
    where = f"{frames[-1].filename.rpartition('/producer/')[2]}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {where}"


def _property(target: Target, check: Check, tally: Tally, count: int, *, derandomize: bool) -> Callable[[], None]:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(target.examples)
    def run(example: Any) -> None:
        tally.executions += 1
        before_bytes, start_s = _peak_bytes(), _clock_s()
        signal.setitimer(signal.ITIMER_REAL, target.bound_s * 3) if not derandomize else None
        try:
            check(example)
        except Exception as error:
            mark = f"{target.name}: {signature(error)}"
            if mark not in KNOWN:
                raise
            tally.known[mark] = tally.known.get(mark, 0) + 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0) if not derandomize else None
        if (took_s := _clock_s() - start_s) > target.bound_s and not derandomize:
            raise FindingError(f"one example took {took_s:.1f} s")
        if (grown := _peak_bytes() - before_bytes) > _MOST_BYTES:
            raise FindingError(f"one example took {grown} bytes")

    return run


def _clock_s() -> float:
    """Return a clock that stands still while this thread waits for a CPU, as it does at the lowest priority."""
    return time.monotonic() - int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _alarm:
    """While entered, an example that hangs is interrupted."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self._on_alarm)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _on_alarm(number: int, frame: FrameType | None) -> None:
        raise FindingError("an example hangs")
