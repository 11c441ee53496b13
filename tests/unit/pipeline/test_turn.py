"""Turns of the loop: which rings are read, and when the next turn is due."""

from pathlib import Path as Folder

import pytest

from producer.pipeline.pipeline import Pipeline
from tests.support.memory_ring import STRIDE
from tests.support.pipeline import (
    AFTER_S,
    RING_ROWS,
    UTC_OFFSET_NS,
    Setup,
)


def test_a_turn_reads_only_rings_that_are_due_and_returns_when_the_next_is() -> None:
    setup = Setup()
    assert setup.pipeline.turn() == pytest.approx(1.0)
    setup.ring.written = 5
    setup.now_s += 0.4
    assert setup.pipeline.turn() == pytest.approx(0.6)
    assert not setup.sink.sent
    setup.now_s += 0.6
    setup.pipeline.turn()
    assert setup.sink.sent == list(range(5))


def test_a_turn_also_reads_rings_that_were_empty_and_are_due_soon_but_no_others() -> None:
    setup = Setup()
    setup.pipeline.turn()
    setup.ring.written = 5
    setup.now_s += 0.6
    setup.pipeline.turn()
    assert setup.sink.sent == list(range(5))
    setup.sink.take_all()
    setup.ring.written = 10
    setup.now_s += 0.6
    setup.pipeline.turn()
    assert setup.sink.sent == list(range(5))


def test_a_turn_that_sends_is_followed_by_looks_for_the_reports_at_growing_distances() -> None:
    setup = Setup()
    ring = setup.rings["retransmit"]
    ring.written = 5
    waits = []
    for _ in range(6):
        waits.append(setup.pipeline.turn())
        setup.now_s += waits[-1]
    assert waits == pytest.approx([0.02, 0.02, 0.04, 0.08, 0.1, 0.1])
    setup.sink.take_all()
    setup.pipeline.turn()
    assert (setup.paths["retransmit"].account.delivered, ring.committed) == (5, 5 * STRIDE)


def test_the_reports_of_a_ring_that_is_not_due_sooner_can_wait() -> None:
    setup = Setup()
    setup.ring.written = 5
    waits = []
    for _ in range(3):
        waits.append(setup.pipeline.turn())
        setup.now_s += waits[-1]
    assert waits == pytest.approx([0.1, 0.1, 0.1])
    setup.sink.take_all()
    setup.pipeline.turn()
    assert (setup.transmits.account.delivered, setup.ring.committed) == (5, 5 * STRIDE)


def test_a_retransmission_that_came_while_others_were_in_flight_is_read_after_their_reports() -> None:
    setup = Setup()
    ring = setup.rings["retransmit"]
    setup.pipeline.turn()
    setup.now_s += 0.5
    ring.written = 1
    setup.pipeline.turn({"retransmit"})
    setup.now_s += 0.02
    setup.pipeline.turn()
    ring.written = 2  # not committed to the end, so the kernel wakes nobody
    setup.now_s += 0.03
    setup.sink.take_all()
    setup.pipeline.turn()
    assert ring.position == 2 * STRIDE


def test_retransmissions_that_are_not_read_at_once_wait_as_other_events_do() -> None:
    setup = Setup()
    setup.pipeline.set_latency(1.0, at_once=False)
    setup.pipeline.turn()
    setup.now_s += 0.1
    ring = setup.rings["retransmit"]
    ring.written = 3
    assert not setup.pipeline.heeds({"retransmit"})
    assert setup.pipeline.turn({"retransmit"}) == pytest.approx(0.9)
    assert ring.position == 0
    setup.now_s += 0.9
    assert setup.pipeline.turn() == pytest.approx(0.1), "when the reports are looked for"
    assert ring.position == 3 * STRIDE


def test_a_ring_without_unread_events_is_not_read() -> None:
    setup = Setup()
    reads: list[int] = []
    setup.ring.read = reads.append  # type: ignore[assignment]
    setup.pipeline.turn()
    setup.now_s += 1
    assert setup.pipeline.turn() == pytest.approx(1.0)
    assert not reads


def test_a_ring_that_fills_is_read_before_it_is_due() -> None:
    setup = Setup()
    setup.pipeline.turn()
    setup.ring.written = RING_ROWS // 5
    assert not setup.pipeline.heeds({"transmit"})
    setup.ring.written = RING_ROWS // 3
    assert setup.pipeline.heeds({"transmit"})
    setup.pipeline.turn({"transmit"})
    assert len(setup.sink.sent) == RING_ROWS // 3


def test_events_wait_in_the_ring_for_those_in_flight_unless_they_fill_it() -> None:
    setup = Setup()
    setup.ring.written = 5
    setup.pipeline.turn()
    setup.now_s += 1.5
    setup.ring.written = RING_ROWS // 5
    assert setup.pipeline.turn() == pytest.approx(0.1)  # the next look for reports
    assert len(setup.sink.sent) == 5
    setup.ring.written = RING_ROWS // 3
    setup.pipeline.turn()
    assert len(setup.sink.sent) == RING_ROWS // 3


def test_events_that_waited_for_those_in_flight_are_sent_in_the_turn_of_the_reports() -> None:
    setup = Setup()
    setup.ring.written = 5
    setup.pipeline.turn()
    setup.now_s += 1.5
    setup.ring.written = 7
    setup.pipeline.turn()
    setup.sink.take_all()
    setup.pipeline.turn()
    assert setup.sink.sent == list(range(7))


def test_retransmissions_do_not_wait_for_those_in_flight() -> None:
    setup = Setup()
    ring = setup.rings["retransmit"]
    ring.written = 1
    setup.pipeline.turn()
    setup.now_s += 0.1
    ring.written = 2
    setup.pipeline.turn({"retransmit"})
    assert ring.position == 2 * STRIDE


def test_a_turn_spills_what_is_overdue_whatever_is_due(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    setup.ring.written = 5
    for seconds in (0.0, AFTER_S - 0.1, 0.11):  # the last turn is not due
        setup.now_s += seconds
        setup.pipeline.turn()
    assert setup.transmits.spooling
    assert setup.ring.committed == 5 * STRIDE


def test_a_stream_whose_step_fails_is_due_again_soon() -> None:
    setup = Setup()
    pipeline = Pipeline(
        list(setup.paths.values()),
        setup.sink,
        lambda: setup.now_s,
        lambda: UTC_OFFSET_NS,
        guard=lambda name, work: None,
    )
    setup.ring.written = 1
    assert pipeline.turn() == pytest.approx(0.1)
