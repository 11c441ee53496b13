"""The spool: names, numbers over restarts, room and age."""

import errno

import pytest

from producer.spool.spool import FullError
from tests.support.spool import (
    BLOCK_BYTES,
    Setup,
    batch,
    fill,
    finish,
    ledger_of,
    read_all,
    size_on_disk,
)

"""About: a batch of ten messages that do not compress."""


def test_files_are_named_by_their_first_event_and_are_their_owners_alone(setup: Setup) -> None:
    spool = setup.filled(7)
    assert setup.names == [f"{number:020}.avro" for number in (0, 30, 60)]
    assert setup.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in setup.files} == {0o600}
    assert spool.size_bytes == size_on_disk(setup)


def test_acknowledged_events_are_deleted_file_by_file(setup: Setup) -> None:
    spool = setup.filled(7)
    for _ in range(4):
        spooled = spool.read()
        assert spooled
        spool.ack(spooled.first, spooled.end)
        spool.sweep()
    assert ledger_of(spool) == (40, 70, 0)
    assert setup.names == [f"{number:020}.avro" for number in (30, 60)]
    assert finish(spool) == list(range(40, 70))
    assert (setup.names, spool.size_bytes, spool.lost) == ([], 0, {})


def test_events_that_were_read_but_not_acknowledged_are_there_at_the_next_start(setup: Setup) -> None:
    spool = setup.filled(4)
    spooled = spool.read()
    assert spooled
    spool.ack(spooled.first, spooled.end)
    assert read_all(spool) == list(range(10, 40))
    ledger = ledger_of(spool)
    spool.close()
    assert read_all(setup.open(ledger)) == list(range(10, 40))


def test_numbers_continue_over_restarts(setup: Setup) -> None:
    ledger = None
    for start in range(3):
        spool = setup.open(ledger)
        assert spool.end == start * 20
        fill(spool, 2)
        ledger = ledger_of(spool)
        spool.close()
    spool = setup.open(ledger)
    assert spool.last
    assert (spool.last.first, spool.last.ring, spool.last.position) == (50, "ring", 400)
    assert finish(spool) == list(range(60))
    spool = setup.open(ledger_of(spool))
    fill(spool, 1)
    assert setup.names == ["00000000000000000060.avro"]


def test_a_ledger_that_is_behind_or_gone_costs_nothing(setup: Setup) -> None:
    setup.filled(7).close()
    for ledger in (None, (0, 0, 0), (0, 40, 0)):
        spool = setup.open(ledger)
        assert ledger_of(spool) == (0, 70, 0)
        assert read_all(spool) == list(range(70))
        spool.close()


def test_after_a_run_without_a_spool_what_was_done_before_is_not_lost(setup: Setup) -> None:
    """Such a run writes a ledger without numbers of a spool."""
    spool = setup.filled(6)
    spool.read()
    spool.ack(0, 40)
    spool.sweep()
    spool.close()
    spool = setup.open((0, 0, 0))
    assert (spool.acked, spool.pending) == (30, 30)
    assert finish(spool) == list(range(30, 60))
    assert not spool.lost


def test_a_read_during_writes_returns_whole_batches(setup: Setup) -> None:
    spool = setup.open()
    found = []
    for _ in range(8):
        fill(spool, 1)
        found += read_all(spool)
    assert found == list(range(80))
    assert finish(setup.open((0, 80, 0))) == found


def test_a_full_spool_rejects_new_events_and_nothing_changes(setup: Setup) -> None:
    spool = setup.open(max_bytes=20 * BLOCK_BYTES)
    with pytest.raises(FullError, match="the spool is full: 24000 bytes") as full:
        fill(spool, 100)
    assert full.value.errno == errno.ENOSPC
    before = {path.name: path.read_bytes() for path in setup.files}
    state = ledger_of(spool), spool.size_bytes
    with pytest.raises(FullError):
        fill(spool, 1)
    assert {path.name: path.read_bytes() for path in setup.files} == before
    assert (ledger_of(spool), spool.size_bytes) == state
    assert spool.size_bytes == size_on_disk(setup) <= 20 * BLOCK_BYTES
    end = spool.end
    assert end > 50

    spooled = [spool.read() for _ in range(6)][-1]
    assert spooled
    spool.ack(0, spooled.end)
    spool.sweep()
    fill(spool, 1)
    assert finish(spool) == list(range(60, end + 10))
    assert not spool.lost


def test_drop_oldest_discards_the_oldest_events_that_are_not_in_flight(setup: Setup) -> None:
    spool = setup.open(max_bytes=20 * BLOCK_BYTES, when_full="drop_oldest")
    while not spool.lost:
        fill(spool, 1)
        if spool.end == 30:
            under_way = spool.read()
    assert under_way
    names = setup.names
    assert names[0] == "00000000000000000000.avro", "a batch of it is in flight"
    dropped = spool.lost["spool_dropped"]
    assert spool.lost == {"spool_dropped": dropped}
    assert names[1] > f"{10 + dropped:020}"
    assert spool.discarded == dropped
    assert spool.size_bytes == size_on_disk(setup) <= 20 * BLOCK_BYTES

    fill(spool, 30)
    dropped = spool.lost["spool_dropped"]
    spool.ack(under_way.first, under_way.end)
    end, discarded = spool.end, spool.discarded
    spool.close()
    spool = setup.open((10, end, discarded), max_bytes=20 * BLOCK_BYTES, when_full="drop_oldest")
    back = finish(spool)
    assert back == sorted(set(back))
    assert len(back) == end - 10 - dropped
    assert back[-1] == end - 1
    assert (spool.lost, spool.discarded) == ({}, 0), "they were counted"


def test_after_events_were_discarded_a_start_reads_only_the_ends_of_files(setup: Setup) -> None:
    """It would take minutes otherwise, of a spool of 100 GiB."""
    options = {"max_bytes": 1 << 24, "file_bytes": 1 << 20, "max_age_s": 60.0}
    spool = setup.filled(1000, **options)
    setup.clock.pass_time(100)
    fill(spool, 3500)
    spool.expire()
    assert spool.lost == {"spool_expired": spool.discarded}
    assert len(setup.names) >= 3
    ledger = ledger_of(spool)
    spool.close()
    setup.disk.calls.clear()
    spool = setup.open(ledger, **options)
    assert setup.disk.calls.count("read") < 10 * len(setup.names)
    assert len(finish(spool)) == ledger[1] - ledger[2]
    assert (spool.lost, spool.discarded) == ({}, 0), "they were counted"


def test_drop_oldest_rejects_new_events_while_all_are_in_flight(setup: Setup) -> None:
    spool = setup.open(max_bytes=20 * BLOCK_BYTES, when_full="drop_oldest")

    def fill_and_read() -> None:
        while True:
            fill(spool, 1)
            spool.read()

    with pytest.raises(FullError):
        fill_and_read()
    assert not spool.lost


def test_old_events_are_discarded_by_a_clock_that_nobody_sets(setup: Setup) -> None:
    spool = setup.open(max_age_s=100)
    fill(spool, 3)
    setup.clock.pass_time(60)
    fill(spool, 3)
    setup.clock.set(1e9)
    spool.expire()
    setup.clock.set(-2e9)
    spool.expire()
    assert not spool.lost
    setup.clock.pass_time(41)
    spool.expire()
    assert spool.lost == {"spool_expired": 30}
    assert finish(spool) == list(range(30, 60))
    assert spool.lost == {"spool_expired": 30}


def test_old_files_are_discarded_a_few_per_call(setup: Setup) -> None:
    spool = setup.filled(120, max_age_s=100)
    files = len(setup.files)
    assert files > 32
    setup.clock.pass_time(101)
    left = [files]
    while left[-1]:
        spool.expire()
        left.append(len(setup.files))
        assert 0 < left[-2] - left[-1] <= 16
    assert spool.lost == {"spool_expired": 1200}


@pytest.mark.parametrize(("seconds", "expires"), [(90, False), (-1e9, False), (110, True)])
def test_across_a_boot_the_age_is_by_the_clock_that_can_be_set(setup: Setup, seconds: float, expires: bool) -> None:
    spool = setup.open(max_age_s=100)
    fill(spool, 3)
    spool.close()
    setup.clock.boot("boot-2", seconds)
    spool = setup.open((0, 30, 0), max_age_s=100)
    spool.expire()
    assert spool.lost == ({"spool_expired": 30} if expires else {})
    assert finish(spool) == ([] if expires else list(range(30)))


def test_events_of_a_boot_whose_clock_was_never_set_do_not_expire_at_the_next(setup: Setup) -> None:
    """A host without a clock of its own begins each boot in 1970."""
    setup.clock.set(100 - setup.clock.now.time_s)
    setup.filled(6).close()
    setup.clock.boot("boot-2", 1.7e9)
    spool = setup.open((0, 60, 0), max_age_s=7 * 86400.0)
    spool.expire()
    assert (finish(spool), spool.lost) == (list(range(60)), {})


def test_events_in_flight_do_not_expire(setup: Setup) -> None:
    spool = setup.open(max_age_s=100)
    fill(spool, 6)
    spool.read()
    setup.clock.pass_time(1000)
    spool.expire()
    assert spool.lost == {"spool_expired": 30}
    assert setup.names == ["00000000000000000000.avro"]


def test_an_unused_file_expires_silently(setup: Setup) -> None:
    spool = setup.open(max_age_s=100)
    fill(spool, 1)
    finish(spool)
    setup.disk.room = 3 * BLOCK_BYTES
    with pytest.raises(OSError, match="No space left"):
        spool.append(batch(10, 40), "ring", 0)
    assert setup.names == ["00000000000000000010.avro"], "a header"
    setup.clock.pass_time(1000)
    spool.expire()
    assert (setup.names, spool.lost) == ([], {})


def test_a_file_is_ended_after_an_hour(setup: Setup) -> None:
    spool = setup.filled(1)
    setup.clock.pass_time(3599)
    fill(spool, 1)
    assert len(setup.names) == 1
    setup.clock.pass_time(2)
    fill(spool, 1)
    assert setup.names == [f"{number:020}.avro" for number in (0, 20)]


def test_events_in_flight_stay_until_they_are_acknowledged(setup: Setup) -> None:
    spool = setup.filled(7)
    files = setup.names
    assert read_all(spool) == list(range(70))
    spool.sweep()
    assert setup.names == files
    spool.ack(0, 30)
    spool.sweep()
    assert setup.names == files[1:]


def test_messages_keep_the_reason_why_they_are_there(setup: Setup) -> None:
    spool = setup.open()
    spool.append(batch(0), "", 0, "INVALID_RECORD")
    spooled = spool.read()
    assert spooled
    assert spooled.reason == "INVALID_RECORD"
