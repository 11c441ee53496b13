"""Clocks: from the kernel's monotonic time to UTC, and a time that is valid across boots."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TRIES = 5
_TIGHT_NS = 20_000
_STEP_NS = 1_000_000
_EARLIEST_S = 1.5e9  # in 2017: no clock that is set shows an earlier time


@dataclass(frozen=True, slots=True)
class Moment:
    """A time on two clocks: one that is valid within a boot only, and one that can be set."""

    boot_id: str
    boottime_s: float
    time_s: float

    def since(self, other: "Moment") -> float:
        """Return the seconds since another moment; across boots, this depends on the clock that can be set.

        0 if that clock was not set yet: without one of its own, a host begins each boot in 1970.
        """
        if self.boot_id == other.boot_id:
            return self.boottime_s - other.boottime_s
        return self.time_s - other.time_s if other.time_s >= _EARLIEST_S else 0.0


@cache
def _namespace_offset_ns() -> int:
    """Return by how much this process's CLOCK_MONOTONIC is ahead of the kernel's: time_namespaces(7)."""
    with suppress(OSError, ValueError):  # a kernel without time namespaces
        for line in Path("/proc/self/timens_offsets").read_text().splitlines():
            match line.split():
                case ["monotonic", seconds, nanoseconds]:
                    return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0


def kernel_ns() -> int:
    """Return the kernel's CLOCK_MONOTONIC, which events have, in nanoseconds."""
    return time.monotonic_ns() - _namespace_offset_ns()


class UtcOffset:
    """The difference between the kernel's CLOCK_MONOTONIC and nanoseconds since 1970 UTC.

    It only changes when the clock is set, since both clocks are disciplined in the same way. Apparent changes of less
    than a millisecond are delays between the two reads; following them would put events of a flow out of order.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = kernel_ns, time_ns: Callable[[], int] = time.time_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._time_ns = time_ns
        self._offset_ns: int | None = None

    def __call__(self) -> int:
        """Return the current offset."""
        width_ns, offset_ns = self._read()
        for _ in range(_TRIES - 1):
            if width_ns < _TIGHT_NS:
                break
            width_ns, offset_ns = min((width_ns, offset_ns), self._read())
        current = self._offset_ns
        if current is None or (width_ns < _TIGHT_NS and abs(offset_ns - current) > _STEP_NS):
            self._offset_ns = offset_ns
        return self._offset_ns or 0

    def _read(self) -> tuple[int, int]:
        """Return the duration of a read, and the offset."""
        before = self._monotonic_ns()
        utc = self._time_ns()
        after = self._monotonic_ns()
        return after - before, utc - (before + after) // 2


@cache
def boot_id() -> str:
    """Return this boot's id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def now() -> Moment:
    """Return the current moment, for the age of spool files."""
    return Moment(boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())
