"""The offset from the monotonic clock to UTC: steady while the process waits between two readings, moved by a step."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.host.clock import UtcOffset

OFFSET_NS = 1_700_000_000_000_000_000


class Clocks:
    """Two clocks; each reading takes what `delays_ns` says next, or 50 ns."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.offset_ns = OFFSET_NS
        self.delays_ns: Iterator[int] = iter(())

    def monotonic_ns(self) -> int:
        self.now_ns += next(self.delays_ns, 50)
        return self.now_ns

    def time_ns(self) -> int:
        return self.monotonic_ns() + self.offset_ns


def test_a_process_that_waits_between_two_readings_has_the_same_offset() -> None:
    clocks = Clocks()
    offset = UtcOffset(clocks.monotonic_ns, clocks.time_ns)
    first = offset()
    assert abs(first - OFFSET_NS) < 1000
    clocks.delays_ns = iter([8_000_000] * 15)
    assert offset() == first
    clocks.delays_ns = iter([50, 8_000_000, 50] * 4)
    assert offset() == first


def test_a_clock_that_is_set_moves_the_offset() -> None:
    clocks = Clocks()
    offset = UtcOffset(clocks.monotonic_ns, clocks.time_ns)
    before = offset()
    clocks.offset_ns -= 3_600_000_000_000
    assert abs(offset() - before + 3_600_000_000_000) < 1000


def test_the_first_reading_is_the_tightest_of_several() -> None:
    clocks = Clocks()
    clocks.delays_ns = iter([50, 8_000_000, 50, 50, 8_000_000, 50])
    assert abs(UtcOffset(clocks.monotonic_ns, clocks.time_ns)() - OFFSET_NS) < 1000


@pytest.mark.root
@pytest.mark.skipif(not Path("/proc/self/timens_offsets").exists(), reason="the kernel has no time namespaces")
def test_a_time_namespace_does_not_move_the_offset() -> None:
    ahead_s = 1_000_000
    program = "from producer.host.clock import UtcOffset, kernel_ns; print(UtcOffset()(), kernel_ns())"
    inside = ["unshare", "--fork", "--time", "--monotonic", str(ahead_s), "--", sys.executable, "-c", program]
    done = subprocess.run(inside, capture_output=True, text=True, check=True)
    offset_ns, kernel_ns = map(int, done.stdout.split())
    assert abs(offset_ns - UtcOffset()()) < ahead_s * 1_000_000_000 / 2
    assert 0 <= time.monotonic_ns() - kernel_ns < ahead_s * 1_000_000_000 / 2
