"""`rebpf check` of the state folder and the folder for pins."""

import os
from pathlib import Path

import pytest

from producer.commands.check import _unusable, examine
from producer.config.load import Config
from producer.host.state import StateFolder
from tests.support.check import check, inside
from tests.support.rebpf import as_nobody, let_others_in

pytestmark = pytest.mark.slow

root = pytest.mark.root


def test_a_state_folder_that_is_not_a_folder(tmp_path):
    (tmp_path / "state").touch()
    code, found = check(tmp_path)

    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is not a folder: remove it, or set state_dir to another path"
    )


@root
def test_folders_of_another_user(tmp_path):
    let_others_in(tmp_path)
    code, found = check(tmp_path, before=as_nobody())
    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is not writable for user 65534: "
        f"install -d -m 0700 -o 65534 {tmp_path}/state"
    )

    for name in ("spool", "quarantine"):
        (tmp_path / "state" / name).mkdir(parents=True)
    os.chown(tmp_path / "state", 65534, 65534)
    code, found = check(tmp_path, before=as_nobody())
    assert code == 78
    assert found["state_dir"] == f"ok      state_dir: {tmp_path}/state is writable"
    for name, label in (("spool", "MISSING"), ("quarantine", "WARNING")):
        assert found[f"state_dir/{name}"] == (
            f"{label} state_dir/{name}: {tmp_path}/state/{name} is not writable for user 65534: "
            f"install -d -m 0700 -o 65534 {tmp_path}/state/{name}"
        )


@root
def test_the_folder_of_the_service_is_no_problem_for_the_root_who_checks_it(tmp_path, monkeypatch):
    monkeypatch.setattr("producer.commands.check_settings.SERVICE_USER", "nobody")
    os.chown(tmp_path, 65534, 65534)
    config = Config().with_values(state_dir=tmp_path)
    (finding,) = (each for each in examine(config, servers=False) if each.subject == "state_dir")
    assert (finding.exit_code, finding.warns) == (0, True)
    assert finding.text == f"{tmp_path} belongs to the service's user rebpf: the service can use it, but not root"


@root
def test_a_spools_folder_of_another_user(tmp_path):
    let_others_in(tmp_path)
    own, others = tmp_path / "state" / "spool", tmp_path / "state" / "spool" / "transmit"
    others.mkdir(parents=True)
    others.chmod(0o700)
    for each in (own.parent, own):
        os.chown(each, 65534, 65534)
    code, found = check(tmp_path, config='kafka.brokers = "127.0.0.1:1"', before=as_nobody())
    assert code == 78
    assert found["state_dir/spool/transmit"].startswith(
        f"MISSING state_dir/spool/transmit: {others} is not writable for user 65534"
    )


@pytest.mark.parametrize("kind", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)])
@pytest.mark.parametrize("config", ["", 'kafka.brokers = "127.0.0.1:1"\ncapture.transmit = false'])
def test_something_else_in_place_of_the_spool_which_a_start_renames(tmp_path, kind, config):
    (tmp_path / "state").mkdir(mode=0o700)
    kind(tmp_path / "state" / "spool")
    assert not [each for each in check(tmp_path, "--local", config=config)[1] if each.startswith("state_dir/")]


@root
def test_a_read_only_disk(mounts, tmp_path):
    (tmp_path / "state").mkdir()
    code, found = check(tmp_path, before=inside(f"mount -t tmpfs -o ro none {tmp_path}/state"))

    assert code == 78
    assert found["state_dir"] == (
        f"MISSING state_dir: {tmp_path}/state is read-only: mount -o remount,rw, or set state_dir to another folder"
    )


@root
def test_a_disk_too_small_for_the_spool(mounts, tmp_path):
    (tmp_path / "state").mkdir()
    code, found = check(tmp_path, before=inside(f"mount -t tmpfs -o size=64m,mode=0700 none {tmp_path}/state"))

    assert code == 0
    assert found["spool"].startswith(f"WARNING spool: {tmp_path}/state has space for 64 MiB, but [spool] allows 1728")
    assert "lower the limits in [spool]" in found["spool"]


@root
def test_pins_that_are_not_in_a_bpffs(tmp_path):
    code, found = check(tmp_path, config=f'capture.pin = "{tmp_path}/pins"')

    assert code == 78
    assert found["capture.pin"] == (
        f"MISSING capture.pin: {tmp_path}/pins is not in a bpffs: mount -t bpf bpf /sys/fs/bpf"
    )


@root
def test_pins_in_a_bpffs_of_another_user(mounts, tmp_path):
    let_others_in(tmp_path)
    pins = tmp_path / "pins"
    pins.mkdir()
    before = inside(f"mount -t bpf -o mode=0755 none {pins}")
    code, found = check(tmp_path, config=f'capture.pin = "{pins}/rebpf"', before=before)
    assert (code, found["capture.pin"]) == (0, f"ok      capture.pin: {pins}/rebpf is writable")

    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 65534, 65534)
    code, found = check(tmp_path, config=f'capture.pin = "{pins}/rebpf"', before=[*before, *as_nobody()])
    assert code == 78
    assert found["capture.pin"] == (
        f"MISSING capture.pin: {pins}/rebpf is not writable for user 65534: install -d -m 0700 -o 65534 {pins}/rebpf"
    )


@root
def test_another_producer(tmp_path):
    """As far as others see it: it holds the lock, and has said who it is."""
    with StateFolder(tmp_path / "state") as state:
        state.publish({})
        code, found = check(tmp_path)

    assert code == 75
    assert found["producer"] == (
        f"MISSING producer: another producer runs with state_dir {tmp_path}/state: pid {os.getpid()}; "
        "see `rebpf status`"
    )
    assert "producer" not in check(tmp_path)[1]


def test_check_local_asks_no_server(tmp_path):
    _, found = check(tmp_path, "--local", "--brokers", "127.0.0.1:1", "--registry", "http://127.0.0.1:1")

    assert not {"Kafka", "registry"} & found.keys()


@pytest.mark.root
@pytest.mark.parametrize("path", ["/proc/rebpf", "/sys/rebpf/state", "/sys/fs/bpf/rebpf"])
def test_a_folder_of_the_kernel_is_no_state_folder(path: str) -> None:
    assert "cannot hold files" in _unusable(Path(path))
