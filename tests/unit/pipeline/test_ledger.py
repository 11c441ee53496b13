"""The ledger: one page, written in place, which is read whole or counts as missing."""

import dataclasses
import json
import os
import resource
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.pipeline.ledger import Account, Ledger
from tests.support.disks import fill, small_disk

PAGE_BYTES = 4096
ACCOUNT = Account("ring-1", 1 << 40, 7, {"REFUSED": 3, "spool_dropped": 1 << 33}, acked=10, end=1 << 50, discarded=2)
numbers = st.integers(0, 1 << 62)
accounts = st.builds(
    Account,
    ring=st.text(max_size=50),
    position=numbers,
    carried=numbers,
    lost=st.dictionaries(st.text(max_size=30), numbers, max_size=8),
    acked=numbers,
    end=numbers,
    discarded=numbers,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.transmit"


def opened(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.open()
    return ledger


def write(path: Path, account: Account) -> None:
    ledger = opened(path)
    ledger.write(account)
    ledger.close()


def write_text(path: Path, text: bytes) -> None:
    path.write_bytes((b"%08x %s" % (zlib.crc32(text), text)).ljust(PAGE_BYTES))


@given(st.lists(accounts, min_size=1, max_size=3))
def test_the_last_write_is_read(tmp_path_factory: pytest.TempPathFactory, written: list[Account]) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    ledger = opened(path)
    for account in written:
        ledger.write(account)
        assert Ledger(path).read() == account
    ledger.close()
    assert Ledger(path).read() == written[-1]


def test_a_page_is_its_owners_alone_and_has_its_room_from_the_beginning(path: Path) -> None:
    ledger = opened(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == PAGE_BYTES
    assert path.stat().st_blocks * 512 >= PAGE_BYTES
    before = path.stat()
    ledger.write(ACCOUNT)
    ledger.write(Account())
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)
    ledger.close()


def test_a_page_that_is_written_in_part_is_an_error(path: Path) -> None:
    ledger = opened(path)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES // 2, usual[1]))
    try:
        with pytest.raises(OSError, match="2048 of 4096 bytes"):
            ledger.write(ACCOUNT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    ledger.write(ACCOUNT)
    assert ledger.read() == ACCOUNT
    ledger.close()


def test_opening_keeps_what_is_there(path: Path) -> None:
    write(path, ACCOUNT)
    ledger = opened(path)
    assert ledger.read() == ACCOUNT
    ledger.close()


def test_an_account_is_neither_missing_nor_damaged_if_descriptors_run_out(path: Path) -> None:
    write(path, ACCOUNT)
    ledger = Ledger(path)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, usual[1]))
    try:
        for call in (ledger.read, ledger.open):
            with pytest.raises(OSError, match="Too many open files"):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert ledger.read() == ACCOUNT


def test_no_file_and_a_page_that_nobody_wrote_are_no_account(path: Path) -> None:
    assert Ledger(path).read() is None
    for _ in range(2):
        opened(path).close()
        assert Ledger(path).read() is None
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing is renamed"
    path.unlink()
    path.mkdir()
    assert Ledger(path).read() is None


@given(st.binary(max_size=200))
def test_garbage_is_no_account(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    path.write_bytes(garbage)
    assert Ledger(path).read() is None


@pytest.mark.parametrize("text", [b"", b"7", b"null", b"[]", b'"text"', b"{", b"\xff", b'{"ring": "a", "color": 1}'])
def test_a_ledger_of_another_version_is_not_read(path: Path, text: bytes) -> None:
    write_text(path, text)
    assert Ledger(path).read() is None


def test_fields_that_came_later_have_their_defaults(path: Path) -> None:
    write_text(path, json.dumps({"ring": "a", "position": 8}).encode())
    assert Ledger(path).read() == Account("a", 8)


@given(st.integers(0, PAGE_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_no_other_account(tmp_path_factory: pytest.TempPathFactory, offset: int, change: int) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    write(path, ACCOUNT)
    page = bytearray(path.read_bytes())
    page[offset] ^= change
    path.write_bytes(page)
    assert Ledger(path).read() in (None, ACCOUNT)


@given(st.integers(0, PAGE_BYTES))
def test_a_torn_page_is_one_account_or_the_other_or_none(tmp_path_factory: pytest.TempPathFactory, torn: int) -> None:
    """After a power cut: the beginning of the new text, and the rest of the old one."""
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    pages = []
    new = dataclasses.replace(ACCOUNT, position=ACCOUNT.position + 8, end=ACCOUNT.end + 1)
    for account in (ACCOUNT, new):
        write(path, account)
        pages.append(path.read_bytes())
    old_page, new_page = pages
    path.write_bytes(new_page[:torn] + old_page[torn:])
    assert Ledger(path).read() in (None, ACCOUNT, new)
    path.write_bytes(new_page[:torn])
    assert Ledger(path).read() in (None, new)


def test_an_account_that_is_longer_than_a_page_is_refused_and_the_last_one_stays(path: Path) -> None:
    ledger = opened(path)
    ledger.write(ACCOUNT)
    with pytest.raises(OSError, match="no page for"):
        ledger.write(Account("ring", lost={f"reason {number}": number for number in range(500)}))
    assert ledger.read() == ACCOUNT
    ledger.close()


def test_a_ledger_that_is_not_open_is_written_nowhere(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(OSError, match="no page"):
        ledger.write(ACCOUNT)
    ledger = opened(path)
    ledger.close()
    ledger.close()
    with pytest.raises(OSError, match="no page"):
        ledger.write(ACCOUNT)


def test_a_missing_folder_is_an_error(path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        opened(path / "ledger")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.root
def test_on_a_disk_that_is_full_the_page_is_written_in_place(disk: Path) -> None:
    path = disk / "ledger"
    ledger = opened(path)
    fill(disk)
    for position in range(5):
        ledger.write(dataclasses.replace(ACCOUNT, position=position))
        assert Ledger(path).read() == dataclasses.replace(ACCOUNT, position=position)
    ledger.close()
    write(path, ACCOUNT)
    assert Ledger(path).read() == ACCOUNT


@pytest.mark.root
def test_on_a_full_disk_a_new_ledger_is_created_once_there_is_room(disk: Path) -> None:
    filler = fill(disk)
    ledger = Ledger(disk / "ledger")
    with pytest.raises(OSError, match="No space left"):
        ledger.open()
    with pytest.raises(OSError, match="No space left"):
        ledger.write(ACCOUNT)
    assert ledger.read() is None
    filler.unlink()
    ledger.write(ACCOUNT)
    assert ledger.read() == ACCOUNT
    ledger.close()
