"""`rebpf compile` before anything is compiled."""

import os
from pathlib import Path

import pytest

from tests.support.rebpf import rebpf


def test_the_kernels_types_are_read_from_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "btf")
    done = rebpf("compile", "--btf", tmp_path / "btf", "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (64, f"rebpf: --btf: {tmp_path}/btf: expected a regular file\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "missing/out"])
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "btf").write_bytes(b"not BTF")
    done = rebpf("compile", "--btf", tmp_path / "btf", "-o", tmp_path / name)
    assert (done.returncode, done.stdout) == (74, "")
    assert done.stderr == f"rebpf: cannot write {tmp_path / name}: expected a file in a folder that exists\n"
