"""A host's switches matter only for the hooks that depend on them."""

from pathlib import Path

import pytest

from producer.errors import UnavailableError
from producer.kernel import hooks, switches
from producer.kernel.hooks import HOOKS_BY_STREAM, Kernel


@pytest.fixture
def off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    on, off, missing = (tmp_path / name for name in ("on", "off", "missing"))
    on.write_text("1\n")
    off.write_text("0\n")
    monkeypatch.setattr(switches, "SWITCHES", {"fentry": (on, missing, tmp_path), "kprobe": (on, off)})
    return off


def test_a_switch_matters_only_for_its_hooks(off: Path) -> None:
    switches.check(("fentry", "raw_tp", "cgroup_skb"))
    with pytest.raises(UnavailableError, match=f"{off} is 0"):
        switches.check(("raw_tp", "kprobe"))


def test_a_hook_whose_probes_are_turned_off_is_refused(off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probes can be attached, so nothing else would show at a start that they capture nothing."""
    kernel: Kernel = None  # type: ignore[assignment]  # not asked
    monkeypatch.setattr(hooks, "_missed_calls", lambda probe, kernel: None)
    monkeypatch.setattr(hooks, "_rejection", lambda probe, kernel: None)
    fentry, kprobe, _ = HOOKS_BY_STREAM["transmit"]
    assert hooks.refusal(fentry, kernel) is None
    assert hooks.refusal(kprobe, kernel) == f"{off} is 0, so no kprobe program runs: write 1 to it"
