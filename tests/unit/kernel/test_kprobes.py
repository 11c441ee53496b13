"""A host's switches for kprobes matter only for that hook."""

from pathlib import Path

import pytest

from producer.errors import UnavailableError
from producer.kernel import kprobes


def test_a_switch_matters_only_for_kprobes(tmp_path: Path) -> None:
    on, off, missing = (tmp_path / name for name in ("on", "off", "missing"))
    on.write_text("1\n")
    off.write_text("0\n")
    kprobes.check(("kprobe", "raw_tp"), (on, missing, tmp_path))
    kprobes.check(("fentry", "raw_tp"), (off,))
    with pytest.raises(UnavailableError, match=f"{off} is 0"):
        kprobes.check(("raw_tp", "kprobe"), (on, off))
