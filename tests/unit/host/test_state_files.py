"""Invalid files in the state folder: null, wrong types, pipes, folders, links, 10 GB."""

import errno
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from producer.events import STREAMS
from producer.host import state_file
from producer.kernel.program_cache import ProgramCache
from producer.kernel.sequence import EventNumbers
from producer.pipeline.ledger import Account, Ledger
from producer.spool.files import made_at
from tests.support.spool import Setup, fill, finish, ledger_of

BOOT = "b5f8c1d2"
DEEP = b"[" * 100_000
HUGE = 10 << 30


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").write_text("mine")


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)


IN_THE_PLACE_OF_A_FILE: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": make_folder,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a file": lambda path: path.symlink_to("/etc/hostname"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "10 GB": make_huge,
}
anything = pytest.mark.parametrize("make", IN_THE_PLACE_OF_A_FILE.values(), ids=IN_THE_PLACE_OF_A_FILE)


def numbers(folder: Path, uptime_s: float, boot: str = BOOT) -> EventNumbers:
    return EventNumbers(folder, boot, 2, lambda: uptime_s)


def all_at(generation: int) -> dict[str, list[int]]:
    return {stream.name: [generation << 32] * 2 for stream in STREAMS}


@anything
def test_a_ledger_that_is_no_file_is_set_aside_and_a_new_one_is_written(
    tmp_path: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.transmit"
    make(path)
    ledger = Ledger(path)
    assert ledger.read() is None
    ledger.open()
    ledger.write(Account("ring", 8))
    ledger.close()
    assert Ledger(path).read() == Account("ring", 8)
    assert os.path.lexists(tmp_path / "ledger.transmit.damaged")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_pipe_beside_a_ledger_that_cannot_be_set_aside_is_an_error(tmp_path: Path) -> None:
    for name in ("", ".1", ".2", ".3"):
        make_folder(tmp_path / f"ledger.damaged{name}")
    os.mkfifo(tmp_path / "ledger")
    with pytest.raises(OSError, match="not a regular file"):
        Ledger(tmp_path / "ledger").open()


@pytest.mark.parametrize(
    "change",
    [
        {"ring": None},
        {"ring": 7},
        {"position": None},
        {"position": "8"},
        {"position": 8.0},
        {"position": True},
        {"position": -8},
        {"end": 1 << 63},
        {"lost": None},
        {"lost": []},
        {"lost": {"stopped": None}},
        {"lost": {"stopped": -1}},
        {"acked": [1]},
        {"discarded": {}},
    ],
)
def test_a_ledger_whose_fields_have_other_types_is_no_account(tmp_path: Path, change: dict[str, object]) -> None:
    text = json.dumps({"ring": "a", "position": 8, **change}).encode()
    (tmp_path / "ledger").write_bytes(b"%08x %s" % (zlib.crc32(text), text))
    assert Ledger(tmp_path / "ledger").read() is None


def test_damaged_ledgers_do_not_pile_up(tmp_path: Path) -> None:
    for _ in range(20):
        (tmp_path / "ledger").write_bytes(b"garbage")
        ledger = Ledger(tmp_path / "ledger")
        ledger.open()
        ledger.close()
    assert {path.name for path in tmp_path.iterdir()} == {"ledger", "ledger.damaged"}


@anything
def test_numbers_jump_where_their_file_is_no_file_and_then_go_on(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "sequence.json")
    first = numbers(tmp_path, 55)
    assert first.start() == all_at(55)
    first.stop(all_at(55))
    assert numbers(tmp_path, 77).start() == all_at(55)


@anything
def test_anything_in_place_of_the_temporary_file_is_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "sequence.new")
    numbers(tmp_path, 55).start()
    assert (tmp_path / "sequence.json").is_file()
    assert not (tmp_path / "sequence.json").is_symlink()


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 1.5},
        {"generation": True},
        {"generation": float("nan")},
        {"generation": None},
        {"last": {"transmit": [1.5, 2], "retransmit": [1, 2]}},
        {"last": {"transmit": [True, 2], "retransmit": [1, 2]}},
        {"last": {"transmit": "12", "retransmit": [1, 2]}},
        {"last": {"transmit": None, "retransmit": [1, 2]}},
        {"last": "transmit"},
        {"last": []},
        {"color": 1},
    ],
)
def test_numbers_of_other_types_cost_a_jump(tmp_path: Path, change: dict[str, object]) -> None:
    content = {"boot_id": BOOT, "generation": 3, "last": None, **change}
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (tmp_path / "sequence.json").write_text(json.dumps({**content, "crc32": crc}))
    assert numbers(tmp_path, 55).start() == all_at(55)


def test_no_changed_byte_makes_numbers_begin_again(tmp_path: Path) -> None:
    """In particular one in the boot id, which would make it the file of another boot."""
    first = numbers(tmp_path, 10)
    first.start()
    first.stop({"transmit": [1009, 7], "retransmit": [0, 13]})
    whole = (tmp_path / "sequence.json").read_bytes()
    for at in range(len(whole)):
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        (tmp_path / "sequence.json").write_bytes(changed)
        assert numbers(tmp_path, 55).start() == all_at(55), changed
    for size in range(len(whole)):
        (tmp_path / "sequence.json").write_bytes(whole[:size])
        assert numbers(tmp_path, 55).start() == all_at(55), size


@pytest.mark.parametrize("content", [b"null", b"[]", b"7", b'"text"', b"\xff", DEEP])
def test_numbers_that_are_other_json_cost_a_jump(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sequence.json").write_bytes(content)
    assert numbers(tmp_path, 55).start() == all_at(55)


def test_numbers_jump_if_their_file_was_deleted(tmp_path: Path) -> None:
    numbers(tmp_path, 10).start()
    Ledger(tmp_path / "ledger.transmit").open()
    (tmp_path / "sequence.json").unlink()
    assert numbers(tmp_path, 55).start() == all_at(55)


@anything
def test_anything_in_place_of_a_spool_file_costs_only_its_events(tmp_path: Path, make: Callable[[Path], None]) -> None:
    setup = Setup(tmp_path / "spool")
    spool = setup.filled(9)
    spool.close()
    setup.files[1].unlink()
    make(setup.folder / f"{30:020}.avro")
    spool = setup.open(ledger_of(spool), max_bytes=1 << 40)
    assert finish(spool) == [*range(30), *range(60, 90)]
    assert spool.lost == {"spool_damaged": 30}
    fill(spool, 1)
    assert setup.names == ["00000000000000000030.damaged", "00000000000000000090.avro"]


@anything
def test_anything_in_place_of_the_last_file_is_set_aside(tmp_path: Path, make: Callable[[Path], None]) -> None:
    setup = Setup(tmp_path / "spool")
    spool = setup.filled(3)
    spool.close()
    make(setup.folder / f"{30:020}.avro")
    spool = setup.open(ledger_of(spool), max_bytes=1 << 40)
    fill(spool, 1)
    assert finish(spool) == list(range(40))
    assert not spool.lost


@anything
def test_an_earlier_damaged_file_may_be_anything(tmp_path: Path, make: Callable[[Path], None]) -> None:
    setup = Setup(tmp_path / "spool")
    setup.folder.mkdir()
    make(setup.folder / f"{7:020}.damaged")
    spool = setup.open()
    fill(spool, 2)
    assert finish(spool) == list(range(20))


@pytest.mark.parametrize("kind", [kind for kind in IN_THE_PLACE_OF_A_FILE if kind != "a folder"])
def test_anything_in_place_of_a_spool_folder_is_set_aside(tmp_path: Path, kind: str) -> None:
    setup = Setup(tmp_path / "spool")
    IN_THE_PLACE_OF_A_FILE[kind](setup.folder)
    spool = setup.open()
    fill(spool, 1)
    assert finish(spool) == list(range(10))
    assert os.path.lexists(tmp_path / "spool.damaged")


@pytest.mark.parametrize("kind", [kind for kind in IN_THE_PLACE_OF_A_FILE if kind != "a folder"])
def test_anything_in_place_of_the_folder_of_spools_is_set_aside(tmp_path: Path, kind: str) -> None:
    setup = Setup(tmp_path / "spools" / "transmit")
    IN_THE_PLACE_OF_A_FILE[kind](setup.folder.parent)
    spool = setup.open()
    fill(spool, 1)
    assert finish(spool) == list(range(10))
    assert os.path.lexists(tmp_path / "spools.damaged")


def test_a_folder_in_the_place_of_a_file_that_is_written_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "agent.json" / "folder").mkdir(parents=True)
    state_file.write(tmp_path / "agent.json", b"{}")
    assert state_file.read(tmp_path / "agent.json", 10) == b"{}"
    assert (tmp_path / "agent.json.damaged" / "folder").is_dir()


def test_a_stray_file_far_ahead_is_no_loss(tmp_path: Path) -> None:
    setup = Setup(tmp_path / "spool")
    spool = setup.filled(2)
    spool.close()
    for name in ("04000000000000000000.avro", "99999999999999999999.avro"):
        (setup.folder / name).write_text("mine")
    spool = setup.open(ledger_of(spool))
    fill(spool, 1)
    assert finish(spool) == list(range(30))
    assert not spool.lost
    assert setup.names == ["04000000000000000000.damaged", "99999999999999999999.avro"]


@pytest.mark.parametrize(
    "made",
    [
        "null",
        "[]",
        '["b", null, 1.0]',
        '{"boot_id": null, "boottime_s": 1.0, "time_s": 1.0}',
        '{"boot_id": "b", "boottime_s": "1", "time_s": 1.0}',
        '{"boot_id": "b", "boottime_s": 1.0, "time_s": null}',
        '{"boot_id": "b", "boottime_s": NaN, "time_s": 1.0}',
        '{"boot_id": "b", "boottime_s": 1e400, "time_s": 1.0}',
        '{"boot_id": "b", "boottime_s": true, "time_s": 1.0}',
        DEEP.decode(),
    ],
)
def test_an_invalid_time_does_not_set_a_files_age(made: str) -> None:
    assert made_at({"rebpf.made": made}) is None


@pytest.mark.root  # only root keeps compiled programs
@anything
def test_an_unusable_program_cache_is_a_warning(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "key.json")
    folder = ProgramCache(tmp_path)
    assert folder.find("key") is None
    assert len(folder.warnings) == 1


@pytest.mark.root  # only root keeps compiled programs
@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"{}",
        DEEP,
        b'{"compiler": [], "maps": [], "programs": []}',
        b'{"compiler": null, "maps": [], "programs": {}}',
        b'{"compiler": [null], "maps": [], "programs": {}}',
        b'{"compiler": [[]], "maps": [], "programs": {}}',
        b'{"compiler": [], "maps": [[1, 2, 3, 4, 5, 6]], "programs": {}}',
        b'{"compiler": [], "maps": [[1, 2, 3, 4, -5, "a"]], "programs": {}}',
        b'{"compiler": [], "maps": [[1, 2, 3, 4, 5, "\\u00e9"]], "programs": {}}',
        b'{"compiler": [], "maps": [], "programs": {"a": "!!"}}',
        b'{"compiler": [], "maps": [], "programs": {"a": "AAA="}}',
        b'{"compiler": [], "maps": [], "programs": {"a": "GBEAAAAAAAAAAAAAAAAAAA=="}}',
        b'{"compiler": [], "maps": [], "programs": {"a": null}}',
    ],
)
def test_cached_programs_with_other_content_are_a_warning(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "key.json").write_bytes(hashlib.sha256(b"key" + body).hexdigest().encode() + b"\n" + body)
    folder = ProgramCache(tmp_path)
    assert folder.find("key") is None
    assert len(folder.warnings) == 1


@anything
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match=r".*") as caught:
        state_file.read(tmp_path / "file", 100)
    assert caught.value.errno in (errno.EINVAL, errno.EFBIG)


def test_a_file_with_nothing_to_read_for_now_is_an_error():
    """Such as /proc/kmsg, to which a link in conf.d may point."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with open(reader, "rb") as file, pytest.raises(OSError, match="expected a regular file"):
            state_file.at_most(file, 1)
    finally:
        os.close(writer)
