"""Clocks: from the kernel's monotonic time to UTC, and a moment that outlives a boot."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TRIES = 5
_TIGHT_NS = 20_000
_STEP_NS = 1_000_000


@dataclass(frozen=True, slots=True)
class Moment:
    """A time as two clocks tell it: one that is right only within a boot, and one that somebody may set."""

    boot_id: str
    boottime_s: float
    time_s: float

    def since(self, other: "Moment") -> float:
        """Return the seconds since another moment; between boots the clock that can be set is all there is."""
        if self.boot_id == other.boot_id:
            return self.boottime_s - other.boottime_s
        return self.time_s - other.time_s


class UtcOffset:
    """What CLOCK_MONOTONIC lacks to nanoseconds since 1970 UTC.

    Both clocks are disciplined alike, so that it changes when somebody sets the clock, and not otherwise. What looks
    like less than a millisecond's change is the time between two readings, in which the process may have to wait: taken
    for a change, it would put events of one flow out of order.
    """

    def __init__(
        self, monotonic_ns: Callable[[], int] = time.monotonic_ns, time_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._time_ns = time_ns
        self._offset_ns: int | None = None

    def __call__(self) -> int:
        """Return the offset now."""
        width_ns, offset_ns = min(self._read() for _ in range(_TRIES))
        known = self._offset_ns
        if known is None or (width_ns < _TIGHT_NS and abs(offset_ns - known) > _STEP_NS):
            self._offset_ns = offset_ns
        return self._offset_ns or 0

    def _read(self) -> tuple[int, int]:
        """Return how long a reading took, and what it said."""
        before = self._monotonic_ns()
        utc = self._time_ns()
        after = self._monotonic_ns()
        return after - before, utc - (before + after) // 2


def boot_id() -> str:
    """Return this boot's id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def now() -> Moment:
    """Return this moment, as a spool tells age."""
    return Moment(boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())
