"""A spool on a disk that fails, is full or is read-only: failed writes can be repeated, and nothing is stored twice."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from producer.spool.disk import Disk
from producer.spool.spool import FullError, Spool
from tests.support.disks import remount, small_disk
from tests.support.spool import (
    BLOCK_BYTES,
    Setup,
    batch,
    fill,
    finish,
    ledger_of,
    numbers,
    read_all,
    size_on_disk,
)


def test_short_writes_are_completed(setup: Setup) -> None:
    setup.disk.most_bytes = 7
    spool = setup.filled(3)
    assert read_all(spool) == list(range(30))
    assert setup.disk.calls.count("write") > 3 * BLOCK_BYTES // 7


@pytest.mark.parametrize("room", [0, 100, BLOCK_BYTES // 2])
def test_a_write_that_fails_leaves_no_trace_and_can_be_repeated(setup: Setup, room: int) -> None:
    spool = setup.filled(1)
    before = {path.name: path.read_bytes() for path in setup.files}
    state = ledger_of(spool), spool.size_bytes
    setup.disk.room = room
    with pytest.raises(OSError, match="No space left"):
        fill(spool, 1)
    assert {path.name: path.read_bytes() for path in setup.files} == before
    assert (ledger_of(spool), spool.size_bytes) == state
    setup.disk.room = 1 << 30
    fill(spool, 1)
    assert finish(spool) == list(range(20))
    assert not spool.lost


@pytest.mark.parametrize("room", [0, 300, 1000])
def test_a_header_that_cannot_be_written_leaves_no_file(setup: Setup, room: int) -> None:
    spool = setup.open()
    setup.disk.room = room
    with pytest.raises(OSError, match="No space left"):
        fill(spool, 1)
    assert (setup.names, spool.size_bytes, spool.end) == ([], 0, 0)
    setup.disk.room = 1 << 30
    fill(spool, 1)
    assert finish(spool) == list(range(10))


def test_a_file_that_could_not_be_removed_is_written_anew(setup: Setup) -> None:
    spool = setup.open()
    setup.disk.room = 300
    setup.disk.fails = {"unlink": errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        fill(spool, 1)
    assert setup.names == ["00000000000000000000.avro"]
    setup.disk.room, setup.disk.fails = 1 << 30, {}
    fill(spool, 1)
    assert finish(spool) == list(range(10))
    assert (setup.names, spool.lost) == ([], {})


def test_nothing_is_written_behind_half_a_batch_that_cannot_be_cut_off(setup: Setup) -> None:
    spool = setup.filled(1)
    setup.disk.room = BLOCK_BYTES // 2
    setup.disk.fails = {"truncate": errno.EIO}
    with pytest.raises(OSError, match="No space left"):
        fill(spool, 1)
    assert spool.size_bytes == size_on_disk(setup)
    setup.disk.room, setup.disk.fails = 1 << 30, {}
    fill(spool, 1)
    assert len(setup.names) == 2
    spool.close()
    spool = setup.open((0, 20, 0))
    assert finish(spool) == list(range(20))
    assert not spool.lost


def test_a_batch_on_disk_despite_a_failed_write_is_not_there_twice(setup: Setup) -> None:
    spool = setup.filled(1)
    setup.disk.fails = {"written": errno.EIO, "truncate": errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        fill(spool, 1)
    assert read_all(spool) == list(range(10))
    setup.disk.fails = {}
    spool.append(batch(10, 15), "ring", 0)
    assert read_all(spool) == list(range(10, 25))
    ledger = ledger_of(spool)
    spool.close()
    spool = setup.open(ledger)
    assert finish(spool) == list(range(25))
    assert not spool.lost

    # And if the process ends there: it is in the spool, and the next start must know.
    spool = setup.filled(1)
    setup.disk.fails = {"written": errno.EIO, "truncate": errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        spool.append(batch(10, 15), "ring", 99)
    setup.disk.fails = {}
    spool = setup.open((0, 10, 0))
    assert spool.last
    assert (spool.end, spool.last.position) == (25, 99)


def test_a_batch_whose_write_failed_is_not_sent_after_it_was_discarded_with_the_next_file(setup: Setup) -> None:
    options = {"max_bytes": 20 * BLOCK_BYTES, "when_full": "drop_oldest"}
    spool = setup.filled(1, **options)
    setup.disk.fails = {"written": errno.EIO, "truncate": errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        fill(spool, 1)
    setup.disk.fails = {}
    assert read_all(spool) == list(range(10))
    while not spool.lost:
        fill(spool, 1)
    dropped = spool.lost["spool_dropped"]
    ledger, pending = ledger_of(spool), spool.pending
    spool.close()
    spool = setup.open(ledger, **options)
    assert spool.pending == pending
    assert finish(spool) == [*range(10), *range(10 + dropped, spool.end)]
    assert (spool.lost, spool.pending) == ({}, 0)


def test_a_file_is_synced_when_it_is_full_and_at_a_stop(setup: Setup) -> None:
    spool = setup.filled(3)
    assert "sync" not in setup.disk.calls
    fill(spool, 1)
    assert setup.disk.calls.count("sync") == 1
    spool.close()
    assert setup.disk.calls.count("sync") == 2


def test_a_failed_sync_is_logged_and_costs_nothing(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    spool = setup.filled(3)
    setup.disk.fails = {"sync": errno.EIO}
    fill(spool, 1)
    assert "Input/output error" in caplog.text
    spool.close()
    assert finish(setup.open((0, 40, 0))) == list(range(40))


def finish_with_patience(setup: Setup, spool: Spool) -> tuple[list[int], int]:
    """Read and acknowledge all batches; after an error, let some minutes pass. Return the events, and the errors."""
    found, errors = [], 0
    while True:
        try:
            if not (spooled := spool.read()):
                break
        except OSError:
            errors += 1
            setup.clock.pass_time(301)
            continue
        found += numbers(spooled.batch)
        spool.ack(spooled.first, spooled.end)
    spool.ack(spool.end, spool.end)
    spool.sweep()
    return found, errors


@pytest.mark.parametrize("call", ["open", "read"])
def test_a_file_that_cannot_be_read_for_minutes_is_set_aside_and_its_events_are_counted(
    setup: Setup, call: str
) -> None:
    spool = setup.filled(6)
    first = spool.read()
    assert first
    spool.ack(0, first.end)
    setup.disk.fails = {call: errno.EIO}
    found, errors = finish_with_patience(setup, spool)
    setup.disk.fails = {}
    assert errors == (2 if call == "read" else 1), "each file is given its minutes"
    assert found == ([] if call == "read" else list(range(10, 30))), "of the first, which is open already"
    assert spool.lost == {"spool_damaged": 50 if call == "read" else 30}
    assert "00000000000000000030.damaged" in setup.names
    fill(spool, 1)
    assert finish(spool) == list(range(60, 70))


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_disk_that_cannot_be_read_for_a_while_costs_nothing(setup: Setup, call: str, number: int) -> None:
    spool = setup.filled(21)
    first = spool.read()
    assert first
    for _ in range(20):
        setup.disk.fails = {call: number}
        with suppress(OSError):  # the first file is open already
            while spool.read():
                pass
        setup.clock.pass_time(14)
    setup.disk.fails = {}
    read_all(spool)
    assert spool.sent == spool.end
    spool.ack(0, spool.end)
    spool.sweep()
    assert (setup.names, spool.lost) == ([], {})


def test_a_file_that_cannot_be_read_at_a_start_stays(setup: Setup) -> None:
    setup.filled(3).close()
    setup.disk.fails = {"read": errno.EIO}
    spool = setup.open()
    assert len(setup.names) == 1
    setup.disk.fails = {}
    fill(spool, 1)
    assert len(setup.names) == 2


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("ledger", [None, (0, 30, 0), (0, 10, 0)])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_nothing_is_set_aside_for_want_of_descriptors_memory_or_permission_at_a_start(
    setup: Setup, call: str, ledger: tuple[int, int, int] | None, number: int
) -> None:
    setup.filled(6).close()
    names = setup.names
    setup.disk.fails = {call: number}
    with pytest.raises(OSError, match=os.strerror(number)):
        setup.open(ledger)
    assert setup.names == names
    setup.disk.fails = {}
    assert finish(setup.open(ledger)) == list(range(60))
    assert setup.names == []


def test_if_nothing_can_be_removed_the_ledger_has_what_is_done(setup: Setup) -> None:
    spool = setup.filled(6)
    setup.disk.fails = {"unlink": errno.EROFS, "rename": errno.EROFS}
    assert finish(spool) == list(range(60))
    ledger = ledger_of(spool)
    assert len(setup.names) == 2
    setup.disk.fails = {}
    spool = setup.open(ledger)
    assert (setup.names, finish(spool), spool.lost) == ([], [], {})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.root
def test_a_real_full_disk_takes_what_fits_and_more_when_there_is_room_again(disk: Path) -> None:
    setup = Setup(disk / "spool")
    setup.disk = Disk()  # type: ignore[assignment]  # the real one
    spool = setup.open(max_bytes=1 << 30, file_bytes=1 << 17)
    with pytest.raises(OSError, match="No space left") as full:
        fill(spool, 5000)
    assert not isinstance(full.value, FullError)
    assert 0 < spool.size_bytes == size_on_disk(setup) <= 1 << 20
    end = spool.end
    assert end > 5000
    with pytest.raises(OSError, match="No space left"):
        spool.append(batch(end, 1000), "ring", 0)
    assert spool.end == end

    while spool.acked < end // 2:
        spooled = spool.read()
        assert spooled
        spool.ack(spooled.first, spooled.end)
        spool.sweep()
    fill(spool, 10)
    spool.close()
    spool = setup.open(ledger_of(spool), max_bytes=1 << 30)
    assert finish(spool)[-1] == end + 99
    assert (setup.names, spool.lost) == ([], {})


@pytest.mark.root
def test_a_real_read_only_disk_is_read_and_takes_nothing(disk: Path) -> None:
    setup = Setup(disk / "spool")
    setup.disk = Disk()  # type: ignore[assignment]  # the real one
    spool = setup.filled(4)
    spool.close()
    remount(disk, "ro")
    spool = setup.open(ledger_of(spool), max_age_s=100)
    with pytest.raises(OSError, match="Read-only file system"):
        fill(spool, 1)
    setup.clock.pass_time(1000)
    with pytest.raises(OSError, match="Read-only file system"):
        spool.expire()
    assert not spool.lost
    assert finish(spool) == list(range(40))
    ledger = ledger_of(spool)
    assert ledger == (40, 40, 0)

    remount(disk, "rw")
    fill(spool, 1)
    assert finish(spool) == list(range(40, 50))
    spool.close()
    spool = setup.open((50, 50, 0))
    assert (setup.names, spool.lost) == ([], {})
