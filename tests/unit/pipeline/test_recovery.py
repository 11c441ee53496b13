"""Starts: where a stream continues, and what is damaged."""

from pathlib import Path as Folder

import numpy as np
import pytest

from producer.events import TRANSMITS, Batch
from producer.host.clock import Moment
from producer.pipeline.ledger import Account
from producer.pipeline.recovery import resume
from producer.spool.spool import Spool
from tests.support.memory_ring import STRIDE, MemoryRing
from tests.support.pipeline import (
    AFTER_S,
    RING_ROWS,
    SCHEMA,
    UTC_OFFSET_NS,
    IdEncoder,
    Setup,
)


def spool_with(folder: Folder, count: int, ring: str) -> Spool:
    """Return a spool with `count` events, which end at position STRIDE * count of a ring."""
    spool = Spool(folder, TRANSMITS, SCHEMA, lambda: Moment("boot", 0, 0), max_bytes=1 << 20)
    spool.open()
    rows = np.zeros(count, TRANSMITS.dtype)
    spool.append(IdEncoder().encode(Batch(TRANSMITS, rows), UTC_OFFSET_NS), ring, STRIDE * count)
    spool.close()
    again = Spool(folder, TRANSMITS, SCHEMA, lambda: Moment("boot", 0, 0), max_bytes=1 << 20)
    again.open()
    return again


@pytest.mark.parametrize(
    ("account", "committed", "resumed"),
    [
        (Account("ring", 7 * STRIDE, 2, {"a": 1}, 0, 7), 7, Account("ring", 7 * STRIDE, 2, {"a": 1}, 0, 7)),
        # The batch is in the spool; the crash came before the ledger, or between it and the ring.
        (Account("ring", 3 * STRIDE, 2, {}, 0, 0), 3, Account("ring", 7 * STRIDE, 2, {}, 0, 7)),
        (Account("ring", 9 * STRIDE, 0, {}, 0, 7), 3, Account("ring", 9 * STRIDE, 0, {}, 0, 7)),
        # A new ring: it never held the spooled events, and other rings' losses do not count.
        (Account("another", 3 * STRIDE, 2, {"a": 1}, 0, 7), 0, Account("ring", 0, 7, {}, 0, 7)),
        (None, 0, Account("ring", 0, 7, {}, 0, 7)),
        # A kept ring without a ledger.
        (None, 4, Account("ring", 4 * STRIDE, 3, {}, 0, 7)),
    ],
)
def test_a_start_continues_from_the_latest_of_ledger_spool_and_ring(
    tmp_path: Folder, account: Account | None, committed: int, resumed: Account
) -> None:
    spool = spool_with(tmp_path, 7, "another" if account is None or account.ring == "another" else "ring")
    ring = MemoryRing(TRANSMITS, RING_ROWS, lambda position: None)
    ring.written = 20
    ring.position = ring.committed = committed * STRIDE

    assert resume(account, "ring", ring, spool) == resumed
    assert ring.position == ring.committed == resumed.position


def test_a_spool_that_is_gone_is_counted_as_damaged() -> None:
    ring = MemoryRing(TRANSMITS, RING_ROWS, lambda position: None)
    account = Account("ring", 0, 9, {"spool_damaged": 1}, acked=2, end=9, discarded=3)
    assert resume(account, "ring", ring, None) == Account("ring", 0, 9, {"spool_damaged": 1 + 4})


def test_damaged_records_are_counted_and_the_others_are_sent_in_order() -> None:
    setup = Setup()
    setup.ring.bad = {0, 3, 4}
    setup.arrive(6)
    assert setup.sink.sent == [1, 2, 5]
    setup.sink.take_all()
    setup.pipeline.step()
    assert setup.transmits.account.lost == {"ring_damaged": 3}
    assert setup.transmits.account.delivered == 3
    assert setup.ring.committed == setup.ring.position
    assert setup.log[-2] == ("ledger", Account("ring", setup.ring.position, 0, {"ring_damaged": 3}))
    setup.assert_balanced()


def test_a_ring_with_only_damaged_records_is_committed(tmp_path: Folder) -> None:
    for folder in (None, tmp_path):
        setup = Setup(folder)
        setup.ring.bad = set(range(7))
        setup.arrive(7)
        assert setup.transmits.account.lost == {"ring_damaged": 7}
        assert setup.ring.committed == setup.ring.position
        setup.assert_balanced()


@pytest.mark.parametrize("spool", [False, True])
def test_damaged_records_leave_the_ring_with_the_batch_in_flight_before_them(tmp_path: Folder, spool: bool) -> None:
    """Their loss is in the ledger then, not earlier: a crash would bring them back, and count them again."""
    setup = Setup(tmp_path if spool else None)
    setup.arrive(5)
    setup.ring.bad = {5, 6}
    setup.arrive(2)
    assert (setup.transmits.account.lost, setup.log) == ({"ring_damaged": 2}, [])
    setup.sink.take_all()
    setup.pipeline.step()
    account = Account("ring", 7 * STRIDE, 0, {"ring_damaged": 2})
    assert setup.log == [("ledger", account), ("commit", 7 * STRIDE)]


def test_damaged_records_beside_a_stuck_kafka_are_counted_and_the_others_go_into_the_spool(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    setup.arrive(3)
    setup.pass_time(AFTER_S + 1)
    setup.ring.bad = {4, 5}
    setup.arrive(5)
    assert setup.transmits.account.lost == {"ring_damaged": 2}
    assert setup.spools["transmit"].end == 6
    setup.assert_balanced()


@pytest.mark.parametrize("position", [999 * STRIDE, 1 << 63])
def test_a_position_beyond_the_ring_is_not_taken_from_ledger_or_spool(position: int) -> None:
    ring = MemoryRing(TRANSMITS, 10, lambda _: None)
    ring.arrive(5)
    ring.position = ring.committed = 2 * STRIDE
    assert resume(Account("ring", position), "ring", ring, None).position == 2 * STRIDE
    assert ring.position == ring.committed == 2 * STRIDE
