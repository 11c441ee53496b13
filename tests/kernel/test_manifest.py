"""Which pinned hooks a start takes over is decided by their manifest; others are replaced or discarded."""

import logging
from pathlib import Path

import pytest

from producer.kernel import hooks
from producer.kernel.capture import Capture
from producer.kernel.pinned import PinFolder
from tests.support.capture import hook_settings, wait_for
from tests.support.programs import ids_of, program_ids
from tests.support.rebpf import UNUSED_PORT
from tests.support.rules import filtered

pytestmark = pytest.mark.root


@pytest.mark.parametrize("target", ["nonsense", '{"fingerprint": "of an older version"}'])
def test_hooks_with_an_unreadable_manifest_are_discarded_with_a_warning(
    pins: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = hook_settings(rules=filtered(ports=(UNUSED_PORT,)))
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        capture.attach()
        old = ids_of(capture)
    (pins / "manifest").unlink()
    (pins / "manifest").symlink_to(target)
    assert old <= program_ids()
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        with caplog.at_level(logging.WARNING):
            capture.load()
        assert "hooks of the last run cannot be taken over, the events in their rings are lost" in caplog.text
        assert not capture.taken_over
        assert capture.old_rings() == []
        assert old <= program_ids()
        capture.attach()
        wait_for(lambda: not old & program_ids(), "the old programs' end")
        capture.detach()


def test_hooks_with_other_probes_are_replaced_although_the_programs_are_the_same(
    pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = hook_settings(rules=filtered(ports=(UNUSED_PORT,)))
    with monkeypatch.context() as patch, PinFolder(pins) as folder:
        patch.setitem(hooks.HOOKS_BY_STREAM, "flow", ())  # the loader still attaches them
        with Capture(settings, folder) as capture:
            capture.load()
            capture.attach()
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        assert not capture.taken_over
        capture.attach()
        capture.detach()


def test_hooks_are_known_by_the_files_from_which_they_were_compiled(
    pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = hook_settings(rules=filtered(ports=(UNUSED_PORT,)))
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        with monkeypatch.context() as patch:
            patch.setattr("producer.kernel.capture.BPF", tmp_path)  # an upgrade has replaced the files
            capture.attach()
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        assert capture.taken_over
        capture.detach()


def test_pins_of_an_interrupted_start_are_removed(pins: Path) -> None:
    settings = hook_settings(rules=filtered(ports=(UNUSED_PORT,)))
    with PinFolder(pins) as folder, Capture(settings, folder) as capture:
        capture.load()
        capture.attach()
        kept = {path.name for path in pins.iterdir()}
        (pins / f"link_0_{0:016}").symlink_to("x")
    with PinFolder(pins):
        assert {path.name for path in pins.iterdir()} == kept
    (pins / "manifest").unlink()
    with PinFolder(pins) as folder:
        assert folder.manifest() is None
        assert list(pins.iterdir()) == []
