"""`rebpf compile` before anything is compiled."""

import os
from pathlib import Path

from tests.support.rebpf import rebpf


def test_the_kernels_types_are_read_from_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "btf")
    done = rebpf("compile", "--btf", tmp_path / "btf", "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (64, f"rebpf: --btf: {tmp_path}/btf: expected a regular file\n")
    assert not (tmp_path / "out").exists()
