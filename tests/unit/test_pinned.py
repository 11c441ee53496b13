"""The folder for pins: only ours, and nothing of others in it is removed."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.commands.check import examine
from producer.config.load import Config
from producer.errors import ConfigError
from producer.kernel.pinned import PinFolder

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a bpffs needs root")]


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "bpffs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    try:
        (folder / "pins").mkdir(mode=0o700)
        yield folder / "pins"
    finally:
        subprocess.run(["umount", folder], check=True)


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


def test_a_subfolder_is_not_ours(pins: Path) -> None:
    (pins / "globals").mkdir()
    assert_refused(pins, "contains objects of other programs")


@pytest.mark.parametrize(("mode", "owner"), [(0o700, 65534), (0o1777, 0), (0o770, 0)])
def test_a_folder_in_which_others_could_pin_is_refused(pins: Path, mode: int, owner: int) -> None:
    pins.chmod(mode)
    os.chown(pins, owner, owner)
    assert_refused(pins, "belongs to uid 0 and that nobody else can write to")


def test_what_an_interrupted_start_left_is_removed(pins: Path) -> None:
    for name in ("transmit_pipe", "link_0", "retransmit_1"):
        (pins / f"{name}_{7:016x}").symlink_to("ours")
    (pins / "manifest_new").symlink_to("ours")
    with PinFolder(pins):
        assert os.listdir(pins) == []
