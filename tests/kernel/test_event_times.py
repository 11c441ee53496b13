"""The time of an event, compared with that of its packet in a capture."""

import time

import numpy as np
import pytest

from producer.demo.lab import Lab
from producer.events import TRANSMITS
from tests.support.capture import DEADLINE_S, Pair, Recording, Skips, inside
from tests.support.comparison import INTERFACE
from tests.support.wire import sniffed

pytestmark = pytest.mark.root


def real_minus_monotonic() -> tuple[int, int]:
    """Return the least and the most that CLOCK_REALTIME can be ahead of CLOCK_MONOTONIC, in nanoseconds."""
    before, now, after = time.time_ns(), time.monotonic_ns(), time.time_ns()
    return before - now, after - now


@pytest.mark.parametrize("version", [4, 6])
def test_an_event_is_later_than_the_packet_before_and_earlier_than_its_own(
    capture: Recording, lab: Lab, port: int, version: int
) -> None:
    skips = Skips(capture)
    bounds = [real_minus_monotonic()]
    with inside(lab.client), sniffed(port, INTERFACE) as packets:
        with Pair(lab.client, lab.server, lab.server.ipv4 if version == 4 else lab.server.ipv6, port) as pair:
            pair.exchange(307, 997)
            pair.transfer(1_000_003)
            pair.end()
        assert lab.wait_idle(DEADLINE_S)
    bounds.append(real_minus_monotonic())
    rows = capture.of_port(TRANSMITS, port)
    rows = rows[rows["s"]["flow"]["netns"] == lab.client.netns]
    if skips.of(TRANSMITS):
        pytest.skip("the kernel skipped a run")
    assert 307 < len(rows) <= len(packets)
    least, most = (choose(each) for choose, each in zip((min, max), zip(*bounds, strict=True), strict=True))
    told = np.sort(rows["s"]["ts"].astype(np.int64))
    on_wire = np.array([packet.ts_ns for packet in packets[: len(rows)]])  # the rest is from time wait
    assert (told + least <= on_wire).all()
    assert (told[1:] + most >= on_wire[:-1]).all()
