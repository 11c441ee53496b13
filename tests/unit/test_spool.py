"""The spool on a real disk: names, restarts, damage, room, age, and disks that fail or are full."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from producer.disk import Disk
from producer.events import TRANSMITS, EncodedBatch
from producer.spool import FullError, Moment, Spool
from tests.unit.disks import remount, small_disk

IDENTITY = {"type": "fixed", "name": "Id", "size": 100}
SCHEMA: dict[str, Any] = {"type": "record", "name": "Event", "fields": [{"name": "id", "type": IDENTITY}]}
MESSAGE_BYTES = 5 + 100
ROWS = 10
BLOCK_BYTES = 1200
"""About: a batch of ten messages that do not compress."""
noise = np.random.default_rng(1)


def batch(first: int, count: int = ROWS) -> EncodedBatch:
    payload = noise.integers(0, 256, (count, MESSAGE_BYTES), np.uint8)
    payload[:, :8] = np.arange(first, first + count).astype(">u8").view(np.uint8).reshape(-1, 8)
    sizes, zeros = np.full(count, MESSAGE_BYTES), np.zeros(count, np.int64)
    keys = np.frombuffer(b"key", np.uint8)
    return EncodedBatch(
        TRANSMITS, payload.reshape(-1), np.arange(count) * MESSAGE_BYTES, sizes, keys, zeros, zeros + len(keys)
    )


def numbers(each: EncodedBatch) -> list[int]:
    return [int.from_bytes(each.payload[at : at + 8].tobytes(), "big") for at in each.starts.tolist()]


class Clock:
    def __init__(self) -> None:
        self.now = Moment("boot-1", 1000.0, 1.7e9)

    def pass_time(self, seconds: float) -> None:
        self.now = Moment(self.now.boot_id, self.now.boottime_s + seconds, self.now.time_s + seconds)

    def set(self, seconds: float) -> None:
        self.now = Moment(self.now.boot_id, self.now.boottime_s, self.now.time_s + seconds)

    def boot(self, boot_id: str, seconds: float) -> None:
        self.now = Moment(boot_id, 10.0, self.now.time_s + seconds)


class FailingDisk(Disk):
    """Raises `fails[call]` where that is set, and takes `most_bytes` of a write at most, and of all writes `room`."""

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.most_bytes = 1 << 30
        self.room = 1 << 30
        self.calls: list[str] = []

    def _meet(self, call: str) -> None:
        self.calls.append(call)
        if number := self.fails.get(call):
            raise OSError(number, os.strerror(number))

    def create(self, path: Path) -> int:
        self._meet("create")
        return super().create(path)

    def open(self, path: Path) -> int:
        self._meet("open")
        return super().open(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._meet("write")
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(descriptor, data[: min(self.most_bytes, self.room)])
        self._meet("written")
        self.room -= taken
        return taken

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        self._meet("read")
        return super().read_at(descriptor, offset, size)

    def truncate(self, descriptor: int, size: int) -> None:
        self._meet("truncate")
        super().truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self._meet("sync")
        super().sync(descriptor)

    def rename(self, path: Path, new: Path) -> None:
        self._meet("rename")
        super().rename(path, new)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        super().unlink(path)


class Setup:
    """A spool, and what its owner does: keeps the ledger, and sends and acknowledges batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.disk = FailingDisk()

    def open(self, ledger: tuple[int, int, int] | None = None, **options: Any) -> Spool:
        arguments = {"max_bytes": 1 << 20, "segment_bytes": 3 * BLOCK_BYTES, "disk": self.disk, **options}
        spool = Spool(self.folder, TRANSMITS, SCHEMA, lambda: self.clock.now, **arguments)
        spool.open(*(ledger or ()))
        return spool

    def filled(self, batches: int, **options: Any) -> Spool:
        spool = self.open(**options)
        fill(spool, batches)
        return spool

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.exists() else []

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.files]


def fill(spool: Spool, batches: int) -> None:
    for _ in range(batches):
        spool.append(batch(spool.end), "ring", spool.end * 8)


def ledger_of(spool: Spool) -> tuple[int, int, int]:
    return spool.acked, spool.end, spool.gone


def read_all(spool: Spool) -> list[int]:
    """Read, and check that each event is the one that its number says."""
    found = []
    while spooled := spool.read():
        assert numbers(spooled.batch) == list(range(spooled.first, spooled.end))
        found += numbers(spooled.batch)
    return found


def finish(spool: Spool) -> list[int]:
    """Read, and note each batch as done; return the numbers of all events that could be read."""
    found = []
    while spooled := spool.read():
        found += numbers(spooled.batch)
        spool.ack(spooled.first, spooled.end)
        spool.sweep()
    spool.ack(spool.end, spool.end)
    spool.sweep()
    return found


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "spool" / "transmit")


def size_on_disk(setup: Setup) -> int:
    return sum(path.stat().st_size for path in setup.files)


def test_files_are_named_by_their_first_event_and_are_their_owners_alone(setup: Setup) -> None:
    spool = setup.filled(7)
    assert setup.names == [f"{number:020}.avro" for number in (0, 30, 60)]
    assert setup.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in setup.files} == {0o600}
    assert spool.size_bytes == size_on_disk(setup)


def test_what_is_done_is_deleted_segment_by_segment(setup: Setup) -> None:
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


def test_what_was_read_and_is_not_done_is_there_for_the_next_start(setup: Setup) -> None:
    spool = setup.filled(4)
    spooled = spool.read()
    assert spooled
    spool.ack(spooled.first, spooled.end)
    assert read_all(spool) == list(range(10, 40))
    ledger = ledger_of(spool)
    spool.close()
    assert read_all(setup.open(ledger)) == list(range(10, 40))


def test_numbers_go_on_over_restarts(setup: Setup) -> None:
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


def test_what_is_read_while_more_is_written_is_whole(setup: Setup) -> None:
    spool = setup.open()
    found = []
    for _ in range(8):
        fill(spool, 1)
        found += read_all(spool)
    assert found == list(range(80))
    assert finish(setup.open((0, 80, 0))) == found


def test_a_torn_tail_is_passed_over_and_new_batches_have_new_numbers(setup: Setup) -> None:
    setup.filled(2).close()
    (path,) = setup.files
    os.truncate(path, path.stat().st_size - 100)
    spool = setup.open((0, 20, 0))
    fill(spool, 1)
    assert finish(spool) == [*range(10), *range(20, 30)]
    assert spool.lost == {"spool_damaged": 10}

    # A ledger that does not know of the batch: it is still in the ring, and comes again.
    setup.filled(2).close()
    (path,) = setup.files
    os.truncate(path, path.stat().st_size - 100)
    spool = setup.open()
    assert (spool.acked, spool.end) == (0, 10)


def damage_batch(path: Path, from_end: int = 2) -> None:
    """Damage a batch, counted from the file's end."""
    data = bytearray(path.read_bytes())
    marker = bytes(data[-16:])
    *_, ending = [each.end() for each in re.finditer(re.escape(marker), data)][:-from_end]
    data[ending + 100] ^= 0xFF
    path.write_bytes(data)


def damage_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + bytes(40) + data[48:])


def test_damage_in_the_middle_is_counted_once_and_the_file_set_aside(setup: Setup) -> None:
    spool = setup.filled(6)
    spool.close()
    damage_batch(setup.files[0])
    spool = setup.open(ledger_of(spool))
    assert finish(spool) == [*range(10), *range(20, 60)]
    assert spool.lost == {"spool_damaged": 10}
    assert setup.names == ["00000000000000000000.damaged"]
    assert spool.size_bytes == size_on_disk(setup) > 0

    spool = setup.open(ledger_of(spool))
    assert (read_all(spool), spool.lost, spool.size_bytes) == ([], {}, size_on_disk(setup))


def test_a_file_whose_header_is_damaged_is_lost_as_a_whole(setup: Setup) -> None:
    spool = setup.filled(6)
    spool.close()
    damage_header(setup.files[0])
    spool = setup.open(ledger_of(spool))
    assert finish(spool) == list(range(30, 60))
    assert spool.lost == {"spool_damaged": 30}
    assert setup.names == ["00000000000000000000.damaged"]


@pytest.mark.parametrize("ledger", [None, (0, 0, 0)])
def test_the_last_file_is_not_deleted_for_being_unreadable(setup: Setup, ledger: Any) -> None:
    """Of another version, say: how many events it holds, nobody knows."""
    setup.filled(3).close()
    (path,) = setup.files
    path.write_bytes(path.read_bytes().replace(b"rebpf.format\x021", b"rebpf.format\x022"))
    before = path.read_bytes()
    spool = setup.open(ledger)
    assert (spool.end, setup.names) == (0, ["00000000000000000000.damaged"])
    assert setup.files[0].read_bytes() == before
    fill(spool, 1)
    assert finish(spool) == list(range(10))


@pytest.mark.parametrize("torn", ["nothing", "the header", "a part of the first batch"])
def test_what_was_being_written_first_leaves_nothing(setup: Setup, torn: str) -> None:
    setup.filled(1).close()
    (path,) = setup.files
    whole = path.read_bytes()
    marker = whole[-16:]
    header_bytes = whole.index(marker) + len(marker)
    sizes = {"nothing": 0, "the header": header_bytes, "a part of the first batch": len(whole) - 1}
    os.truncate(path, sizes[torn])
    spool = setup.open()
    assert (spool.end, setup.names, spool.size_bytes) == (0, [], 0)


def test_a_few_damaged_files_are_kept_and_they_give_way_to_events(setup: Setup) -> None:
    spool = setup.filled(7 * 3)
    spool.close()
    for path in setup.files[:6]:
        damage_batch(path)
    spool = setup.open(ledger_of(spool))
    finish(spool)
    assert spool.lost == {"spool_damaged": 60}
    assert setup.names == [f"{number:020}.damaged" for number in (60, 90, 120, 150)]

    room = spool.size_bytes + 2 * BLOCK_BYTES
    spool = setup.open(ledger_of(spool), max_bytes=room)
    while len(setup.names) > 1:
        fill(spool, 1)
        assert spool.size_bytes == size_on_disk(setup) <= room
        assert len(setup.names) < 20
        if all(name.endswith(".avro") for name in setup.names):
            break
    assert not [name for name in setup.names if name.endswith(".damaged")]
    assert not spool.lost


@pytest.mark.parametrize(("index", "lost"), [(0, range(30)), (1, range(30, 60)), (2, range(60, 70))])
def test_a_file_that_somebody_deleted_is_counted(setup: Setup, index: int, lost: range) -> None:
    spool = setup.filled(7)
    ledger = ledger_of(spool)
    spool.close()
    setup.files[index].unlink()
    spool = setup.open(ledger)
    assert finish(spool) == [number for number in range(70) if number not in lost]
    assert spool.lost == {"spool_damaged": len(lost)}
    assert ledger_of(spool) == (70, 70, 0)


def test_a_file_that_somebody_deletes_meanwhile_is_counted(setup: Setup) -> None:
    spool = setup.filled(7)
    setup.files[1].unlink()
    assert finish(spool) == [*range(30), *range(60, 70)]
    assert spool.lost == {"spool_damaged": 30}


def test_all_files_deleted_are_counted(setup: Setup) -> None:
    spool = setup.filled(7)
    spool.close()
    for path in setup.files:
        path.unlink()
    spool = setup.open(ledger_of(spool))
    assert finish(spool) == []
    assert spool.lost == {"spool_damaged": 70}


@pytest.mark.parametrize("name", ["12.avro", "notes.avro", "00000000000000000007.avro.bak", "00000000000000000030"])
def test_foreign_files_are_let_be(setup: Setup, name: str) -> None:
    setup.filled(7).close()
    (setup.folder / name).write_text("mine")
    spool = setup.open((0, 70, 0))
    assert finish(spool) == list(range(70))
    assert (setup.names, spool.size_bytes, spool.lost) == ([name], 0, {})


def test_without_room_old_events_are_kept_and_nothing_changes(setup: Setup) -> None:
    spool = setup.open(max_bytes=20 * BLOCK_BYTES)
    with pytest.raises(FullError, match="the spool has its 24000 bytes") as full:
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


def test_to_keep_new_events_the_oldest_that_are_not_under_way_are_given_up(setup: Setup) -> None:
    spool = setup.open(max_bytes=20 * BLOCK_BYTES, keep="new")
    while not spool.lost:
        fill(spool, 1)
        if spool.end == 30:
            under_way = spool.read()
    assert under_way
    names = setup.names
    assert names[0] == "00000000000000000000.avro", "of it a batch is under way"
    dropped = spool.lost["spool_dropped"]
    assert spool.lost == {"spool_dropped": dropped}
    assert names[1] > f"{10 + dropped:020}"
    assert spool.gone == dropped
    assert spool.size_bytes == size_on_disk(setup) <= 20 * BLOCK_BYTES

    fill(spool, 30)
    dropped = spool.lost["spool_dropped"]
    spool.ack(under_way.first, under_way.end)
    end, gone = spool.end, spool.gone
    spool.close()
    spool = setup.open((10, end, gone), max_bytes=20 * BLOCK_BYTES, keep="new")
    back = finish(spool)
    assert back == sorted(set(back))
    assert len(back) == end - 10 - dropped
    assert back[-1] == end - 1
    assert (spool.lost, spool.gone) == ({}, 0), "they were counted"


def test_with_all_under_way_there_is_no_room_for_new_events_either(setup: Setup) -> None:
    spool = setup.open(max_bytes=20 * BLOCK_BYTES, keep="new")

    def fill_and_read() -> None:
        while True:
            fill(spool, 1)
            spool.read()

    with pytest.raises(FullError):
        fill_and_read()
    assert not spool.lost


def test_what_is_too_old_is_given_up_by_a_clock_that_nobody_sets(setup: Setup) -> None:
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


@pytest.mark.parametrize(("seconds", "expires"), [(90, False), (-1e9, False), (110, True)])
def test_over_a_boot_the_clock_that_can_be_set_is_all_there_is(setup: Setup, seconds: float, expires: bool) -> None:
    spool = setup.open(max_age_s=100)
    fill(spool, 3)
    spool.close()
    setup.clock.boot("boot-2", seconds)
    spool = setup.open((0, 30, 0), max_age_s=100)
    spool.expire()
    assert spool.lost == ({"spool_expired": 30} if expires else {})
    assert finish(spool) == ([] if expires else list(range(30)))


def test_what_is_under_way_does_not_expire(setup: Setup) -> None:
    spool = setup.open(max_age_s=100)
    fill(spool, 6)
    spool.read()
    setup.clock.pass_time(1000)
    spool.expire()
    assert spool.lost == {"spool_expired": 30}
    assert setup.names == ["00000000000000000000.avro"]


def test_a_segment_that_was_never_used_expires_without_a_word(setup: Setup) -> None:
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


def test_a_segment_is_ended_after_an_hour(setup: Setup) -> None:
    spool = setup.filled(1)
    setup.clock.pass_time(3599)
    fill(spool, 1)
    assert len(setup.names) == 1
    setup.clock.pass_time(2)
    fill(spool, 1)
    assert setup.names == [f"{number:020}.avro" for number in (0, 20)]


def test_short_writes_are_gone_on_with(setup: Setup) -> None:
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


def test_where_half_a_batch_cannot_be_cut_off_nothing_is_written_behind_it(setup: Setup) -> None:
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


def test_a_batch_that_is_there_though_its_write_failed_is_not_there_twice(setup: Setup) -> None:
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


def test_a_segment_is_put_on_the_disk_itself_when_it_is_full_and_at_a_stop(setup: Setup) -> None:
    spool = setup.filled(3)
    assert "sync" not in setup.disk.calls
    fill(spool, 1)
    assert setup.disk.calls.count("sync") == 1
    spool.close()
    assert setup.disk.calls.count("sync") == 2


def test_a_disk_that_cannot_sync_is_told_of_and_costs_nothing(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    spool = setup.filled(3)
    setup.disk.fails = {"sync": errno.EIO}
    fill(spool, 1)
    assert "Input/output error" in caplog.text
    spool.close()
    assert finish(setup.open((0, 40, 0))) == list(range(40))


@pytest.mark.parametrize("call", ["open", "read"])
def test_what_cannot_be_read_is_lost_and_counted_and_the_file_set_aside(setup: Setup, call: str) -> None:
    spool = setup.filled(6)
    first = spool.read()
    assert first
    spool.ack(0, first.end)
    setup.disk.fails = {call: errno.EIO}
    found = finish(spool)
    setup.disk.fails = {}
    assert found == ([] if call == "read" else list(range(10, 30))), "of the first, which is open already"
    assert spool.lost == {"spool_damaged": 50 if call == "read" else 30}
    assert "00000000000000000030.damaged" in setup.names
    fill(spool, 1)
    assert finish(spool) == list(range(60, 70))


def test_a_file_that_cannot_be_read_at_a_start_stays(setup: Setup) -> None:
    setup.filled(3).close()
    setup.disk.fails = {"read": errno.EIO}
    spool = setup.open()
    assert len(setup.names) == 1
    setup.disk.fails = {}
    fill(spool, 1)
    assert len(setup.names) == 2


def test_where_nothing_can_be_removed_the_ledger_says_what_is_done(setup: Setup) -> None:
    spool = setup.filled(6)
    setup.disk.fails = {"unlink": errno.EROFS, "rename": errno.EROFS}
    assert finish(spool) == list(range(60))
    ledger = ledger_of(spool)
    assert len(setup.names) == 2
    setup.disk.fails = {}
    spool = setup.open(ledger)
    assert (setup.names, finish(spool), spool.lost) == ([], [], {})


def test_what_is_under_way_stays_until_it_is_acknowledged(setup: Setup) -> None:
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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.root
def test_a_real_full_disk_takes_what_fits_and_more_when_there_is_room_again(disk: Path) -> None:
    setup = Setup(disk / "spool")
    setup.disk = Disk()  # type: ignore[assignment]  # the real one
    spool = setup.open(max_bytes=1 << 30, segment_bytes=1 << 17)
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
