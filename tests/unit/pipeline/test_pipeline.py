"""The pipeline step by step: direct to Kafka, through the spool, back again, and the order of writes.

Ring, encoder and Kafka are in memory; the spool is real. All orders of events, with crashes: tests/property.
"""

import errno
import os
from pathlib import Path as Folder

import pytest

from producer.events import RETRANSMITS, TRANSMITS
from producer.pipeline.ledger import Account
from producer.pipeline.ring_reader import BATCH_ROWS
from tests.support.memory_ring import STRIDE
from tests.support.pipeline import (
    AFTER_S,
    WAIT_S,
    IdEncoder,
    Setup,
)


def test_while_kafka_takes_them_events_go_to_it_and_nothing_is_on_disk(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    for _ in range(3):
        setup.arrive(5)
        setup.now_s += 1
        setup.sink.take_all()
        setup.pipeline.step()
        setup.pass_time(10 * AFTER_S)

    assert setup.sink.sent == list(range(15))
    assert setup.ring.committed == 15 * STRIDE
    assert (setup.transmits.account.delivered, setup.transmits.spooling, setup.files) == (15, False, [])
    assert setup.ages == [(100.0, 5), (121.0, 5), (142.0, 5)]


def test_a_stream_without_room_stays_in_its_ring_and_the_other_goes_on() -> None:
    setup = Setup(most=3)
    setup.rings["transmit"].written, setup.rings["retransmit"].written = 5, 2
    setup.pipeline.step()
    setup.sink.report(RETRANSMITS, 0, 2)
    setup.rings["retransmit"].written += 2
    setup.pipeline.step()
    setup.pipeline.step()

    assert (setup.ring.position, setup.ring.committed) == (3 * STRIDE, 0)
    assert setup.rings["retransmit"].position == 4 * STRIDE
    assert setup.rings["retransmit"].committed == 2 * STRIDE
    setup.sink.report(TRANSMITS, 0, 3, "refused")
    setup.pipeline.step()
    assert setup.ring.committed == 3 * STRIDE
    assert setup.transmits.account.lost == {"refused": 3}
    setup.pipeline.step()
    assert setup.ring.position == 5 * STRIDE


def test_a_batch_behind_one_that_is_not_done_gives_no_room_back() -> None:
    setup = Setup()
    for _ in range(3):
        setup.arrive(2)
    setup.sink.report(TRANSMITS, 2, 2)
    setup.sink.report(TRANSMITS, 1, 2)
    setup.sink.report(TRANSMITS, 0, 1)
    setup.pipeline.step()
    assert (setup.ring.committed, setup.transmits.account.delivered) == (0, 5)

    setup.sink.report(TRANSMITS, 0, 1)
    setup.pipeline.step()
    assert setup.ring.committed == 6 * STRIDE


def test_a_batch_that_is_done_is_not_spilled_with_the_one_before_it(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    setup.arrive(2)
    setup.arrive(3)
    setup.sink.report(TRANSMITS, 1, 3)
    setup.pipeline.poll_reports()
    setup.pass_time(2 * AFTER_S)
    assert (setup.spools["transmit"].end, setup.ring.committed) == (2, 5 * STRIDE)
    setup.assert_balanced()


def test_a_batch_is_at_most_one_produce_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdEncoder, "key", b"k" * 10_000)
    setup = Setup()
    setup.arrive(8)
    setup.arrive(500)
    first, second = (len(batch) for batch, _, _ in setup.sink.open["transmit"][:2])
    assert first == 8
    assert 90 < second < 100  # of 1 MB


def test_step_says_whether_more_is_likely_to_wait() -> None:
    setup = Setup()
    assert not setup.pipeline.step()
    setup.ring.written = BATCH_ROWS + 5
    assert setup.pipeline.step()
    assert not setup.pipeline.step()
    assert setup.ring.position == (BATCH_ROWS + 5) * STRIDE


def test_events_that_kafka_does_not_take_go_to_disk_until_the_spool_is_empty_again(
    tmp_path: Folder,
) -> None:
    setup = Setup(tmp_path)
    setup.arrive(5)
    setup.pass_time(AFTER_S)
    assert (setup.files, setup.ring.committed) == ([], 0)
    setup.pass_time(0.1)
    assert (len(setup.files), setup.ring.committed) == (1, 5 * STRIDE)
    setup.arrive(3)
    setup.arrive(4)
    assert setup.transmits.spooling
    assert setup.ring.committed == 12 * STRIDE
    setup.assert_balanced()

    setup.sink.take_all()
    setup.pipeline.step()
    assert not setup.files
    setup.pipeline.step()
    assert not setup.transmits.spooling
    setup.arrive(2)
    assert setup.sink.sent == list(range(14)), "each once, in order"
    assert (setup.files, setup.ring.committed) == ([], 12 * STRIDE)
    setup.sink.take_all()
    setup.pipeline.step()
    assert (setup.transmits.account.delivered, setup.ring.committed) == (14, 14 * STRIDE)


def test_new_events_wait_behind_spooled_ones_while_kafka_is_full(tmp_path: Folder) -> None:
    setup = Setup(tmp_path, most=4)
    setup.arrive(4)
    setup.pass_time(2 * AFTER_S)
    for _ in range(3):
        setup.arrive(4)
    assert setup.sink.sent == [0, 1, 2, 3]
    assert setup.transmits.spooled == 12
    while setup.sink.open["transmit"]:
        setup.sink.take_all()
        setup.arrive(1 if setup.ring.written < 20 else 0)
        setup.assert_balanced()

    assert setup.sink.sent == list(range(20))
    setup.pipeline.step()
    assert not setup.files


@pytest.mark.parametrize(("rows", "most", "spools"), [(500, 10, False), (501, 10, True), (501, 1 << 20, False)])
def test_a_ring_that_is_half_full_goes_to_disk_at_once_unless_kafka_has_room(
    tmp_path: Folder, rows: int, most: int, spools: bool
) -> None:
    setup = Setup(tmp_path, most=most)
    setup.arrive(10)
    setup.arrive(rows - 10)
    assert setup.transmits.spooling == spools
    assert bool(setup.files) == spools
    setup.assert_balanced()


def test_on_a_full_disk_events_stay_in_the_ring_until_there_is_room(tmp_path: Folder) -> None:
    setup = Setup(tmp_path, most=5)
    setup.disk.full = True
    setup.arrive(5)
    setup.pass_time(2 * AFTER_S)
    setup.arrive(6)
    assert setup.transmits.spool_error == "No space left on device"
    assert (setup.ring.committed, setup.ring.position, setup.files) == (0, 5 * STRIDE, [])

    setup.disk.full = False
    setup.pass_time(WAIT_S / 2)
    assert not setup.files, "not before the wait is over"
    setup.pass_time(WAIT_S / 2)
    assert (setup.ring.committed, len(setup.files)) == (11 * STRIDE, 1)
    assert (setup.transmits.spool_error, setup.waits.resets) == ("", 1)
    setup.assert_balanced()
    while setup.sink.open["transmit"]:
        setup.sink.take_all()
        setup.pipeline.step()
    assert setup.sink.sent == list(range(11))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_spool_that_cannot_be_read_because_descriptors_or_memory_run_out_waits(tmp_path: Folder, number: int) -> None:
    setup = Setup(tmp_path, most=5)
    setup.arrive(5)
    setup.pass_time(2 * AFTER_S)
    setup.arrive(6)
    setup.disk.unreadable = number
    setup.sink.take_all()
    setup.pipeline.step()
    assert setup.transmits.spool_error == os.strerror(number)
    assert setup.transmits.spooled == 6

    setup.disk.unreadable = 0
    for _ in range(5):
        setup.pipeline.step()
        setup.sink.take_all()
    assert setup.sink.sent == list(range(11))
    assert (setup.transmits.account.lost, setup.transmits.spool_error) == ({}, "")
    setup.assert_balanced()


def test_spooled_events_that_could_not_be_sent_for_lack_of_memory_are_sent_later(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path)
    setup.arrive(5)
    setup.pass_time(AFTER_S + 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(setup.sink, "send", lambda batch: raises(MemoryError))
        with pytest.raises(MemoryError):
            setup.arrive(3)
    setup.sink.take_all()
    setup.pipeline.step()
    setup.sink.take_all()
    setup.pipeline.step()

    assert setup.sink.sent == list(range(8))
    assert not setup.files
    assert not setup.transmits.spooling
    assert not setup.transmits.account.lost
    setup.assert_balanced()


def raises(error: type[Exception]) -> None:
    raise error


def test_rows_that_the_disk_did_not_take_are_read_again(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    setup.arrive(5)
    setup.pass_time(2 * AFTER_S)
    setup.disk.full = True
    setup.arrive(3)
    assert (setup.ring.position, setup.ring.committed) == (5 * STRIDE, 5 * STRIDE)
    setup.disk.full = False
    setup.pipeline.spill_all()  # a stop does not wait for back-off
    assert setup.ring.committed == 8 * STRIDE
    setup.pipeline.step()
    assert setup.sink.sent == list(range(8))
    assert setup.counted == list(range(8)), "once"


def test_with_a_full_disk_kafka_gets_what_it_takes_straight_from_the_ring(tmp_path: Folder) -> None:
    setup = Setup(tmp_path, most=5)
    setup.disk.full = True
    setup.arrive(12)
    setup.pass_time(2 * AFTER_S)
    for _ in range(6):
        setup.sink.take_all()
        setup.pipeline.step()

    assert setup.sink.sent == list(range(12))
    assert setup.transmits.account.delivered == 12


def test_one_stream_waits_on_disk_while_the_other_goes_to_kafka(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    for _ in range(4):
        setup.rings["retransmit"].written += 3
        setup.arrive(5)
        for _ in setup.sink.open["retransmit"]:
            setup.sink.report(RETRANSMITS, 0, 3)
        setup.pass_time(AFTER_S * 0.9)

    assert [path.spooling for path in setup.paths.values()] == [True, False, False]
    assert {file.split("/")[0] for file in setup.files} == {"transmit"}
    assert (setup.paths["retransmit"].account.delivered, setup.transmits.account.delivered) == (12, 0)
    assert setup.ring.committed == 20 * STRIDE
    setup.assert_balanced()


def test_a_checkpoint_writes_the_ledger_then_commits_then_deletes_files(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    setup.arrive(5)
    setup.pass_time(2 * AFTER_S)
    setup.sink.report(TRANSMITS, 0, 2, "REFUSED")
    setup.arrive(3)

    (ledger, first), (commit, _), (_, second), *_ = setup.log
    assert (ledger, commit) == ("ledger", "commit")
    assert first == Account("ring", 5 * STRIDE, 0, {}, acked=0, end=5)
    assert second == Account("ring", 8 * STRIDE, 0, {}, acked=0, end=8), (
        "losses of what may be resent are not included yet"
    )
    setup.log.clear()
    setup.ledger_errno = errno.EROFS
    setup.sink.take_all()
    setup.pipeline.step()
    assert setup.transmits.account.ledger_error == "Read-only file system"
    assert setup.files, "the ledger does not say that they are done"

    setup.ledger_errno = 0
    setup.pipeline.step()
    setup.sink.take_all()
    setup.pipeline.step()
    assert setup.log[-1] == ("ledger", Account("ring", 8 * STRIDE, 0, {"REFUSED": 2}, acked=8, end=8))
    assert (setup.files, setup.transmits.account.ledger_error) == ([], "")


def test_losses_are_in_the_ledger_before_the_ring_is_committed() -> None:
    setup = Setup()
    setup.arrive(5)
    setup.sink.report(TRANSMITS, 0, 5, "REFUSED")
    setup.pipeline.step()

    assert setup.log == [("ledger", Account("ring", 5 * STRIDE, 0, {"REFUSED": 5})), ("commit", 5 * STRIDE)]


@pytest.mark.parametrize("spool", [False, True])
def test_losses_of_a_batch_that_may_be_read_again_after_a_crash_are_not_in_the_ledger_yet(
    tmp_path: Folder, spool: bool
) -> None:
    setup = Setup(tmp_path if spool else None)
    setup.arrive(5)
    setup.sink.report(TRANSMITS, 0, 2, "REFUSED")
    setup.arrive(5)
    setup.sink.report(TRANSMITS, 1, 5, "REFUSED")
    setup.paths["transmit"].account.count_lost({"old_ring": 4})
    setup.pipeline.step()

    assert setup.transmits.account.lost == {"REFUSED": 7, "old_ring": 4}
    assert setup.log == [("ledger", Account("ring", 0, 0, {"old_ring": 4}))]


def test_rows_that_take_long_are_encoded_in_several_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Folder) -> None:
    monkeypatch.setattr(IdEncoder, "most", 3)
    setup = Setup(tmp_path)
    setup.ring.bad = {1}
    setup.arrive(8)
    assert setup.sink.sent == [0, 2]
    while setup.pipeline.step():
        pass
    assert setup.sink.sent == [0, 2, 3, 4, 5, 6, 7]
    assert setup.transmits.account.lost == {"ring_damaged": 1}
    setup.pass_time(AFTER_S + 1)
    setup.arrive(7)
    setup.pipeline.spill_all()
    assert setup.spools["transmit"].end == 7 + 7
    setup.assert_balanced()


def test_a_failure_after_one_streams_reports_loses_no_report_of_another(tmp_path: Folder) -> None:
    setup = Setup(tmp_path)
    for name in ("transmit", "retransmit"):
        setup.rings[name].written = 5
    setup.pipeline.step()

    def failing() -> None:
        raise OSError(errno.EIO, "of a disk")

    for spool in setup.spools.values():
        spool.sweep = failing  # type: ignore[method-assign]
    setup.sink.take_all()
    with pytest.raises(OSError, match="of a disk"):
        setup.pipeline.poll_reports()
    assert [setup.paths[name].account.delivered for name in ("transmit", "retransmit")] == [5, 5]
