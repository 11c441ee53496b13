"""The program cache: what it returns, and what it does not trust."""

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from producer.kernel.bpf_syscall import RETURN_0, MapInfo, instruction
from producer.kernel.program_cache import MAX_FILES, Compiled, ProgramCache, key
from producer.kernel.source import HZ_MARK
from tests.support.disks import remount, small_disk

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LD_IMM64, MAP_FD, MAP_VALUE = 0x18, 1, 2
SECOND_HALF = bytes(8)
KEY = "a" * 64
MAPS = (MapInfo(27, 0, 0, 4096, 0, "ring"), MapInfo(11, 24, 4, 1009, 1, "prefixes"))


def load_64(kind: int, immediate: int) -> bytes:
    return instruction(LD_IMM64, 1, kind, 0, immediate) + SECOND_HALF


COMPILED = Compiled(MAPS, {"one": load_64(MAP_FD, 1) + load_64(0, 1) + load_64(MAP_FD, 0) + RETURN_0, "two": RETURN_0})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("root alone keeps compiled programs")
    return tmp_path / "compiled"


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "libbcc.so.0"
    path.write_bytes(b"a compiler")
    return path


@pytest.fixture
def file(path: Path, compiler: Path) -> Path:
    """A valid file of KEY."""
    ProgramCache(path).put(KEY, COMPILED, [str(compiler)])
    return path / f"{KEY}.json"


def test_instructions_have_the_descriptors_of_their_maps_and_nothing_else_has_changed() -> None:
    patched = load_64(MAP_FD, 63) + load_64(0, 1) + load_64(MAP_FD, 41) + RETURN_0
    assert COMPILED.instructions("one", [41, 63], 250) == patched
    # The second half of a 64-bit load is a number, even if it looks like an instruction.
    number = instruction(LD_IMM64, 1, 0, 0, 7) + instruction(LD_IMM64, 0, MAP_FD, 0, 1)
    assert Compiled(MAPS, {"p": number + RETURN_0}).instructions("p", [41, 63], 250) == number + RETURN_0


def test_the_mark_of_hz_becomes_the_kernels_and_no_other_number_changes() -> None:
    def number(value: int) -> bytes:
        low, high = struct.unpack("<ii", struct.pack("<Q", value))
        return instruction(LD_IMM64, 1, 0, 0, low) + instruction(0, 0, 0, 0, high)

    others = number(HZ_MARK + 1) + number(HZ_MARK & 0xFFFFFFFF)
    made = Compiled([], {"p": number(HZ_MARK) + others + RETURN_0})
    assert made.instructions("p", [], 250) == number(250) + others + RETURN_0


def test_a_reference_to_something_other_than_a_map_is_an_error() -> None:
    with pytest.raises(ValueError, match="instruction 2 refers to something other than a map"):
        Compiled.from_loaded({"p": load_64(0, 1) + load_64(MAP_VALUE, 3) + RETURN_0}, [])


def test_cached_programs_are_found_only_by_their_key(path: Path, file: Path) -> None:
    folder = ProgramCache(path)
    found = folder.find(KEY)
    assert found is not None
    assert (list(found.maps), found.programs) == (list(COMPILED.maps), COMPILED.programs)
    assert folder.find("b" * 64) is None
    assert folder.warnings == []
    assert [each.stat().st_mode & 0o777 for each in (path, file)] == [0o700, 0o600]


def test_a_file_under_another_key_is_not_used(path: Path, file: Path) -> None:
    file.rename(path / f"{'b' * 64}.json")
    folder = ProgramCache(path)
    assert folder.find("b" * 64) is None
    assert "damaged" in folder.warnings[0]


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize(
    "change", [flip, lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" + data[1:]],
    ids=["a bit", "an end", "all", "the checksum"],
)  # fmt: skip
def test_a_damaged_file_is_reported_and_replaced(path: Path, file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))
    folder = ProgramCache(path)
    assert folder.find(KEY) is None
    assert folder.warnings == [f"compiled programs: {KEY}.json is damaged"]
    folder.put(KEY, COMPILED, [])
    assert folder.find(KEY) is not None


def give_away(path: Path) -> None:
    os.chown(path, 65534, -1)


def for_the_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def for_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


@pytest.mark.parametrize("change", [pytest.param(give_away, marks=ROOT_ONLY), for_the_group, for_all])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_programs_that_others_can_write_are_not_loaded(
    path: Path, file: Path, what: str, change: Callable[[Path], None]
) -> None:
    change(path if what == "folder" else file)
    folder = ProgramCache(path)
    assert folder.find(KEY) is None
    assert len(folder.warnings) == 1
    assert "must belong to root and be writable only by root" in folder.warnings[0]
    folder.put(KEY, COMPILED, [])
    assert len(folder.warnings) == 1, "once is enough"
    assert (folder.find(KEY) is None) == (what == "folder"), "a file is replaced, a folder is not"


@pytest.mark.parametrize("change", [give_away, for_the_group, for_all])
def test_files_below_a_folder_of_others_are_not_loaded(tmp_path: Path, change: Callable[[Path], None]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = tmp_path / "others" / "own" / "compiled"
    path.parent.mkdir(parents=True)
    ProgramCache(path).put(KEY, COMPILED, [])
    change(tmp_path / "others")
    folder = ProgramCache(path)
    assert folder.find(KEY) is None
    before = path.stat().st_mtime_ns
    folder.put("b" * 64, COMPILED, [])
    assert path.stat().st_mtime_ns == before
    assert folder.warnings == [f"compiled programs: {tmp_path}/others must belong to root and be writable only by root"]


def test_a_link_on_the_way_to_the_folder_is_not_followed(path: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    folder = ProgramCache(tmp_path / "link" / "compiled")
    assert folder.find(KEY) is None
    assert folder.warnings == [f"compiled programs: {tmp_path}/link is a link or not a folder"]


def test_a_user_that_is_not_root_neither_writes_nor_loads(path: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    os.seteuid(65534)
    try:
        folder = ProgramCache(path)
        folder.put(KEY, COMPILED, [])
        assert folder.find(KEY) is None
        assert folder.warnings == []
    finally:
        os.seteuid(0)
    assert not path.exists()


@pytest.mark.parametrize(
    "body",
    [b"null", b"[]", b"7", b"{}", b"[" * 99999, b'{"compiler": [["\\u0000", 1]], "maps": [], "programs": {}}',
     b'{"compiler": null, "maps": [], "programs": {}}', b'{"compiler": [], "maps": [null], "programs": {}}'],
    ids=lambda body: body[:60].decode(),
)  # fmt: skip
def test_wrong_contents_are_ignored(path: Path, body: bytes) -> None:
    path.mkdir()
    (path / f"{KEY}.json").write_bytes(hashlib.sha256(KEY.encode() + body).hexdigest().encode() + b"\n" + body)
    assert ProgramCache(path).find(KEY) is None


def test_symbolic_links_are_not_followed(path: Path, file: Path, tmp_path: Path) -> None:
    folder = ProgramCache(path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert folder.find(KEY) is None
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    assert folder.find(KEY) is None
    assert len(folder.warnings) == 2


def test_with_another_compiler_programs_are_compiled_again(path: Path, file: Path, compiler: Path) -> None:
    folder = ProgramCache(path)
    compiler.write_bytes(b"an upgrade")
    os.utime(compiler, ns=(1, 1))
    assert folder.find(KEY) is None
    folder.put(KEY, COMPILED, [str(compiler)])
    assert folder.find(KEY) is not None
    compiler.unlink()
    assert folder.find(KEY) is None
    assert folder.warnings == []


def test_only_the_most_recently_used_stay(path: Path) -> None:
    folder = ProgramCache(path)
    oldest, second, *others = (f"{i:064}" for i in range(MAX_FILES))
    for age, each in enumerate([oldest, second, *others]):
        folder.put(each, COMPILED, [])
        os.utime(path / f"{each}.json", (age, age))
    left = (path / "tmp0abc_xyz", path / f"{'b' * 64}.new")
    foreign = (path / "main.json", path / "notes", path / "tmp")
    for file in (*left, *foreign):
        file.touch()
        os.utime(file, (0, 0))
    assert folder.find(oldest) is not None
    folder.put(KEY, COMPILED, [])
    ours = (f"{each}.json" for each in (oldest, *others, KEY))
    assert {each.name for each in path.iterdir()} == {*ours, *(each.name for each in foreign)}


@ROOT_ONLY
def test_a_full_disk_is_reported_once(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        ProgramCache(disk / "used").put(KEY, COMPILED, [])
        remount(disk, "ro")
        folder = ProgramCache(disk / "new")
        assert folder.find(KEY) is None
        folder.put(KEY, COMPILED, [])
        assert len(folder.warnings) == 1
        assert "Read-only file system" in folder.warnings[0]
        assert ProgramCache(disk / "used").find(KEY) is not None


def test_without_a_folder_nothing_is_cached() -> None:
    folder = ProgramCache(None)
    folder.put(KEY, COMPILED, [])
    assert folder.find(KEY) is None
    assert folder.warnings == []


def test_the_key_depends_on_all_inputs(tmp_path: Path) -> None:
    header = tmp_path / "include" / "linux" / "types.h"
    header.parent.mkdir(parents=True)
    header.write_text("typedef unsigned int u32;")
    flags, programs = ["-DA=1"], ["fentry_a"]
    keys = [
        key(tmp_path, "int a;", flags, programs),
        key(tmp_path, "int b;", flags, programs),
        key(tmp_path, "int a;", ["-DA=2"], programs),
        key(tmp_path, "int a;", flags, ["fentry_b"]),
    ]
    header.write_text("typedef unsigned long u32;")
    keys.append(key(tmp_path, "int a;", flags, programs))
    header.rename(header.with_name("other.h"))
    keys.append(key(tmp_path, "int a;", flags, programs))
    assert len(set(keys)) == len(keys)
    assert key(tmp_path, "int a;", flags, programs) == keys[-1]
