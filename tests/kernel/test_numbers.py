"""Event numbers (cpu_seq) begin where they should, and continue after an orderly stop."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from producer.events import FLOWS, RETRANSMITS, STREAMS, TRANSMITS
from producer.kernel.bpf_syscall import possible_cpus
from producer.kernel.capture import Capture
from producer.kernel.sequence import EventNumbers
from tests.support.capture import hook_settings
from tests.support.rules import filtered

pytestmark = pytest.mark.root

CPUS = possible_cpus()


class FixedNumbers:
    """Fixed first numbers; `last` has the recorded last ones."""

    def __init__(self, first: Mapping[str, Sequence[int]]) -> None:
        self._first = first
        self.last: Mapping[str, Sequence[int]] = {}

    def start(self, *, overlap: bool) -> Mapping[str, Sequence[int]]:
        assert not overlap
        return self._first

    def resume(self) -> None:
        raise AssertionError("nothing was taken over")

    def stop(self, last: Mapping[str, Sequence[int]]) -> None:
        self.last = last


def connect(address: tuple[str, int], count: int) -> None:
    for _ in range(count):
        socket.create_connection(address).close()


def test_numbers_begin_after_the_given_ones_and_counters_at_zero() -> None:
    first = {stream.name: [(stream.index + 3 << 32) + 1009 * cpu for cpu in range(CPUS)] for stream in STREAMS}
    fixed = FixedNumbers(first)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with Capture(hook_settings(rules=filtered(ports=(address[1],))), numbers=fixed) as capture:
            capture.load()
            capture.attach()
            assert capture.sequence(RETRANSMITS) == first["retransmit"]
            connect(address, 53)
            capture.detach()
            connect(address, 1)
            passed = capture.counters(TRANSMITS).passed
            last, last_flow = capture.sequence(TRANSMITS), capture.sequence(FLOWS)
            with capture.ring(TRANSMITS) as ring:
                rows = ring.read(passed + 1)
    assert 53 * 3 <= passed == len(rows)
    assert fixed.last == {"transmit": last, "retransmit": first["retransmit"], "flow": last_flow}
    for cpu, (before, behind) in enumerate(zip(first["transmit"], last, strict=True)):
        numbers = np.sort(rows["s"]["cpu_seq"][rows["s"]["cpu"] == cpu])
        assert (numbers == np.arange(before + 1, behind + 1, dtype=np.uint64)).all()


def test_an_orderly_stop_is_continued_and_a_crash_is_a_jump(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        settings = hook_settings(rules=filtered(ports=(address[1],)))

        def run(*, crash: bool) -> tuple[list[int], list[int]]:
            with Capture(settings, numbers=EventNumbers(tmp_path, "a boot", CPUS)) as capture:
                capture.load()
                capture.attach()
                first = capture.sequence(TRANSMITS)
                connect(address, 11)
                if not crash:
                    capture.detach()
                return first, capture.sequence(TRANSMITS)

        first, last = run(crash=False)
        assert first == [0] * CPUS
        assert sum(last) >= 11 * 3
        first, _ = run(crash=True)
        assert first == last
        first, _ = run(crash=False)
        assert len(set(first)) == 1
        assert first[0] > 0
        assert first[0] % (1 << 32) == 0
