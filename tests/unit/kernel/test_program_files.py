"""Files of compiled programs: which one a host uses, and what it says of the others."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from producer.kernel.bpf_syscall import RETURN_0, MapInfo
from producer.kernel.program_cache import Compiled
from producer.kernel.program_files import Identity, ProgramFiles, combination, packed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of others are not used")

HOST = Identity("1.2.3", "x86_64", "sources", "kernel")
ONE = Compiled([MapInfo(27, 0, 0, 4096, 0, "ring")], {"one": RETURN_0})
TWO = Compiled([], {"two": RETURN_0})
PROGRAMS = {"transmit=fentry": ONE, "transmit=fentry flow=raw_tp": TWO}


def write(path: Path, identity: Identity = HOST) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(packed(identity, PROGRAMS))
    path.chmod(0o644)
    return path


def test_the_programs_of_a_combination_are_found_and_those_of_others_not(tmp_path: Path) -> None:
    files = ProgramFiles(write(tmp_path / "a"), HOST)
    assert (files.fitting, files.refusals) == (tmp_path / "a", [])
    assert files.find(combination({"transmit": "fentry"})) == ONE
    assert files.find(combination({"flow": "raw_tp", "transmit": "fentry"})) == TWO
    assert files.find("transmit=") is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"made_for": "b"}, "made for another kernel, whose structs or features differ from this one's"),
        ({"made_of": "b", "version": "1.1.0"},
         "made by ReBPF 1.1.0, whose programs differ from those of 1.2.3 here"),
        ({"machine": "aarch64"}, "made for aarch64, but this host is x86_64"),
    ],
)  # fmt: skip
def test_a_file_for_another_host_is_refused_by_name_with_the_fix(
    tmp_path: Path, changed: dict[str, str], says: str
) -> None:
    path = write(tmp_path / "a", replace(HOST, **changed))
    files = ProgramFiles(path, HOST)
    assert (files.fitting, files.find("transmit=fentry")) == (None, None)
    assert files.none_fits() == (
        f"no programs in capture.programs fit: {path}: {says}: "
        "run `rebpf compile` of this version for this kernel, on a host with bcc"
    )


def test_a_version_with_the_same_programs_uses_them(tmp_path: Path) -> None:
    assert ProgramFiles(write(tmp_path / "a", replace(HOST, version="1.1.0")), HOST).find("transmit=fentry") == ONE


def test_in_a_folder_the_one_that_fits_is_used_and_the_first_reasons_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    for name in "abcde":
        write(folder / name, replace(HOST, made_for=name))
    write(folder / ".f-in-transfer")
    files = ProgramFiles(folder, HOST)
    assert files.fitting is None
    assert files.none_fits().count(" made for another kernel") == 3
    assert "; and 2 more: run " in files.none_fits()
    write(folder / "d")
    assert ProgramFiles(folder, HOST).fitting == folder / "d"


def give_away(path: Path) -> None:
    os.chown(path, 65534, -1)


def for_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


@pytest.mark.parametrize("change", [give_away, for_all])
@pytest.mark.parametrize("what", ["programs", "programs/a"])
def test_programs_that_others_can_write_are_not_loaded(
    tmp_path: Path, what: str, change: Callable[[Path], None]
) -> None:
    write(tmp_path / "programs" / "a")
    change(tmp_path / what)
    for path in (tmp_path / "programs", tmp_path / "programs" / "a"):
        files = ProgramFiles(path, HOST)
        assert files.fitting is None
        assert f"{tmp_path / what} must belong to root and be writable only by root" in files.none_fits()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged"),
        (lambda data: data[:-20], "damaged"),
        (lambda data: b"", "not a file of `rebpf compile`"),
        (lambda data: b"\x7fELF\n" + data[10:80], "not a file of `rebpf compile`"),
        (lambda data: b"0\nnull", "not a file of `rebpf compile`"),
        (lambda data: b'0\n{"format": "rebpf programs 1"}', "not a file of `rebpf compile`"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], says: str) -> None:
    path = write(tmp_path / "a")
    path.write_bytes(change(path.read_bytes()))
    assert ProgramFiles(path, HOST).refusals == [f"{path}: {says}"]


def test_a_link_a_folder_in_the_folder_and_no_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "programs" / "folder").mkdir(parents=True)
    (tmp_path / "programs" / "link").symlink_to(tmp_path / "a")
    assert ProgramFiles(tmp_path / "programs", HOST).refusals == [
        f"{tmp_path}/programs/{name}: not a regular file" for name in ("folder", "link")
    ]
    assert ProgramFiles(tmp_path / "none", HOST).refusals == [f"{tmp_path}/none: No such file or directory"]
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty: no file: run" in ProgramFiles(tmp_path / "empty", HOST).none_fits()


def test_without_the_setting_nothing_is_looked_for_and_nothing_is_said() -> None:
    files = ProgramFiles(None, HOST)
    assert (files.find("transmit=fentry"), files.none_fits()) == (None, "")
