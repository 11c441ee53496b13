"""A spool whose files are torn, damaged, foreign or missing: readable events are read, the others are counted."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.procfs import open_files
from tests.support.spool import BLOCK_BYTES, Setup, fill, finish, ledger_of, read_all, size_on_disk


def test_a_torn_tail_is_skipped_and_new_batches_have_new_numbers(setup: Setup) -> None:
    setup.filled(2).close()
    (path,) = setup.files
    os.truncate(path, path.stat().st_size - 100)
    spool = setup.open((0, 20, 0))
    fill(spool, 1)
    assert finish(spool) == [*range(10), *range(20, 30)]
    assert spool.lost == {"spool_damaged": 10}

    # The ledger does not have the batch: it is still in the ring, and is read again.
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


def test_a_file_whose_header_is_damaged_is_closed(setup: Setup) -> None:
    """A descriptor that stayed open would also keep the disk space of the file once it is deleted."""
    spool = setup.filled(6)
    spool.close()
    damage_header(setup.files[0])
    spool = setup.open(ledger_of(spool))
    finish(spool)
    spool.close()
    assert [path for path in open_files() if path.startswith(str(setup.folder))] == []


@pytest.mark.parametrize("ledger", [None, (0, 0, 0)])
def test_the_last_file_is_not_deleted_for_being_unreadable(setup: Setup, ledger: Any) -> None:
    """Of another version, for example: its number of events is unknown."""
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
def test_an_interrupted_first_write_leaves_nothing(setup: Setup, torn: str) -> None:
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


@pytest.mark.parametrize("with_folder", [False, True])
def test_nothing_is_written_to_a_file_that_somebody_has_deleted(setup: Setup, with_folder: bool) -> None:
    spool = setup.filled(1)
    if with_folder:
        shutil.rmtree(setup.folder.parent)
    else:
        setup.files[0].unlink()
    fill(spool, 2)
    assert finish(spool) == list(range(10, 30))
    assert spool.lost == {"spool_damaged": 10}


def test_all_files_deleted_are_counted(setup: Setup) -> None:
    spool = setup.filled(7)
    spool.close()
    for path in setup.files:
        path.unlink()
    spool = setup.open(ledger_of(spool))
    assert finish(spool) == []
    assert spool.lost == {"spool_damaged": 70}


@pytest.mark.parametrize("name", ["12.avro", "notes.avro", "00000000000000000007.avro.bak", "00000000000000000030"])
def test_foreign_files_are_left_alone(setup: Setup, name: str) -> None:
    setup.filled(7).close()
    (setup.folder / name).write_text("mine")
    spool = setup.open((0, 70, 0))
    assert finish(spool) == list(range(70))
    assert (setup.names, spool.size_bytes, spool.lost) == ([name], 0, {})
