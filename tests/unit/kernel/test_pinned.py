"""The folder for pins: only ours, and nothing of others in it is removed."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.commands.check import examine
from producer.config.load import Config
from producer.errors import BusyError, ConfigError, UnavailableError
from producer.kernel.pinned import PinFolder
from tests.support.disks import bpffs

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a bpffs needs root")]


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with bpffs(tmp_path / "bpffs") as folder:
        (folder / "pins").mkdir(mode=0o700)
        yield folder / "pins"


def assert_refused(pins: Path, why: str) -> None:
    before = sorted(os.listdir(pins))
    with pytest.raises(ConfigError, match=why), PinFolder(pins):
        pass
    assert sorted(os.listdir(pins)) == before
    findings = examine(Config().with_values(capture__pin=pins, state_dir=pins.parents[1] / "state"), servers=False)
    assert [each.exit_code for each in findings if each.subject == "capture.pin"] == [78]


@pytest.mark.parametrize("name", ["tc", "cilium_calls", "progs_4", "manifest2", "link_0_0123456789abcdeg"])
@pytest.mark.parametrize("with_ours", [False, True])
def test_a_folder_with_objects_of_other_programs_is_refused_and_nothing_is_removed(
    pins: Path, name: str, with_ours: bool
) -> None:
    (pins / name).symlink_to("theirs")  # the only file that a bpffs makes without a BPF object
    if with_ours:
        (pins / f"link_0_{0:016x}").symlink_to("ours")
    assert_refused(pins, f"contains objects of other programs \\({name}\\)")


def test_a_read_only_bpffs_is_refused(pins: Path) -> None:
    """As that of a container with /sys/fs/bpf:ro, or of a unit with ProtectKernelTunables=yes."""
    subprocess.run(["mount", "-o", "remount,ro", pins.parent], check=True)
    assert_refused(pins, "is read-only here")


def test_a_subfolder_is_not_ours(pins: Path) -> None:
    (pins / "globals").mkdir()
    assert_refused(pins, "contains objects of other programs")


def test_a_name_that_a_bpffs_refuses_is_named(pins: Path) -> None:
    path = pins.parent / "new" / "rebpf.pins"
    with pytest.raises(ConfigError, match=r"a bpffs has no names with dots: .* rebpf\.pins"):
        PinFolder(path).__enter__()
    findings = examine(Config().with_values(capture__pin=path, state_dir=pins.parents[1] / "state"), servers=False)
    assert [each.exit_code for each in findings if each.subject == "capture.pin"] == [78]


@pytest.mark.parametrize(("mode", "owner"), [(0o700, 65534), (0o1777, 0), (0o770, 0)])
def test_a_folder_in_which_others_could_pin_is_refused(pins: Path, mode: int, owner: int) -> None:
    pins.chmod(mode)
    os.chown(pins, owner, owner)
    assert_refused(pins, "belongs to uid 0 and that nobody else can write to")


def test_leftovers_of_an_interrupted_start_are_removed(pins: Path) -> None:
    for name in ("transmit_pipe", "link_0", "retransmit_1"):
        (pins / f"{name}_{7:016x}").symlink_to("ours")
    (pins / "manifest_new").symlink_to("ours")
    with PinFolder(pins):
        assert os.listdir(pins) == []


@pytest.fixture
def filled(pins: Path) -> Iterator[PinFolder]:
    """A folder with a pin, in use. A link stands for a BPF object."""
    with PinFolder(pins) as folder:
        (pins / NAME).symlink_to("/")
        folder.save({NAME: 0}, {})
        folder.check()
        yield folder


NAME = f"link_0_{7:016x}"
OTHER = f"link_1_{7:016x}"


def test_a_pin_that_someone_removes_is_noticed_and_clearing_goes_on(pins: Path, filled: PinFolder) -> None:
    (pins / NAME).unlink()
    with pytest.raises(UnavailableError, match=f"capture.pin {pins}: {NAME} is gone, so a crash would lose"):
        filled.check()
    filled.clear()
    assert os.listdir(pins) == []


def test_a_folder_that_someone_removes_is_noticed_and_clearing_goes_on(pins: Path, filled: PinFolder) -> None:
    shutil.rmtree(pins)
    with pytest.raises(UnavailableError, match="the folder is gone"):
        filled.check()
    filled.clear()


def test_a_folder_that_someone_replaces_is_noticed_and_left_alone(pins: Path, filled: PinFolder) -> None:
    pins.rename(pins.with_name("moved"))
    pins.mkdir(mode=0o700)
    (pins / OTHER).symlink_to("theirs")
    with pytest.raises(UnavailableError, match="the folder is gone"):
        filled.check()
    filled.clear()
    assert os.listdir(pins) == [OTHER]
    assert os.listdir(pins.with_name("moved")) == []


def test_a_folder_that_became_read_only_ends_no_stop(
    pins: Path, filled: PinFolder, caplog: pytest.LogCaptureFixture
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", pins.parent], check=True)
    try:
        filled.clear()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", pins.parent], check=True)
    assert [each.getMessage() for each in caplog.records] == [
        "hooks stay pinned, without rules: [Errno 30] Read-only file system: 'manifest'"
    ]


def test_without_a_bpffs_the_error_says_how_to_mount_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not in a bpffs\. Mount one"), PinFolder(tmp_path / "a" / "pins"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_of_another_producer_stops_a_start_and_check_says_so(pins: Path) -> None:
    """Of one with another state folder, whose lock does not show it."""
    config = Config().with_values(capture__pin=pins, state_dir=pins.parents[1] / "state")
    with PinFolder(pins):
        with pytest.raises(BusyError), PinFolder(pins):
            pass
        findings = examine(config, servers=False)
    assert [each.exit_code for each in findings if each.subject == "capture.pin"] == [BusyError.exit_code]
    assert [each.exit_code for each in examine(config, servers=False) if each.subject == "capture.pin"] == [0]
