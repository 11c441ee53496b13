"""The loader process: its environment and its descriptors."""

import contextlib
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from producer import errors
from producer.kernel import loader as loader_module
from producer.kernel.loader import Loader, python_with_bcc
from tests.support.procfs import open_files

START = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from producer.errors import UnavailableError
from producer.kernel.loader import Loader
try:
    Loader()
except UnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [16, 64, 127])
def test_a_low_descriptor_limit_is_reported(limit: int) -> None:
    command = [sys.executable, "-c", START, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("too few file descriptors: raise LimitNOFILE= of the unit, or ulimit -n")
    assert f"(now {limit}, at least 128)" in done.stdout


def test_exhausted_descriptors_are_reported() -> None:
    """The limit suffices, but all descriptors are in use."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(errors.UnavailableError, match="too few file descriptors"):
            Loader()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_loader_that_cannot_be_started_leaves_no_descriptors_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "python_with_bcc", lambda: "/nowhere/python3")
    before = Counter(open_files())
    with pytest.raises(errors.UnavailableError, match=r"cannot start the loader: .*/nowhere/python3"):
        Loader()
    assert Counter(open_files()) <= before


def test_a_host_need_not_have_a_python_in_usr_bin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the container images of Python."""
    monkeypatch.setattr(loader_module, "_SYSTEM_PYTHON", str(tmp_path / "python3"))
    python_with_bcc.cache_clear()
    try:
        with contextlib.suppress(errors.UnavailableError):  # if no other one has bcc
            assert Path(python_with_bcc()).exists()
    finally:
        python_with_bcc.cache_clear()


def test_the_loader_does_not_inherit_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTHONPATH", "LD_PRELOAD_X", "BCC_PROBE", "CPATH", "PASSWORD")
    for name in names:
        monkeypatch.setenv(name, "/nowhere")
    loader = Loader()
    try:
        (child,) = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1:]
        environment = Path(f"/proc/{child}/environ").read_bytes()
    finally:
        loader.end()
    assert not [name for name in names if name.encode() in environment]


def test_a_signal_to_our_process_group_does_not_reach_the_loader() -> None:
    loader = Loader()
    try:
        (child,) = map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1:])
        assert os.getpgid(child) == child != os.getpgrp()
    finally:
        loader.end()


def test_the_childs_output_is_logged_and_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nyes noise | head -100000 >&2\nprintf '\\033[2J\\n\\377 last\\n'\n")
    python.chmod(0o755)
    monkeypatch.setattr("producer.kernel.loader.python_with_bcc", lambda: str(python))
    loader = Loader()
    with pytest.raises(errors.HookError, match="without an answer"):
        loader.ask({})
    loader.end()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 20
    assert told[-2:] == ["loader: \x1b[2J", "loader: \ufffd last"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (
            "os.kill(os.getpid(), 9)",
            "the loader was killed, perhaps because memory ran out: .* raise MemoryMax= of the unit",
        ),
        ("os.kill(os.getpid(), 15)", "the loader exited with status -15 without an answer"),
        ("sys.exit(9)", "the loader exited with status 9 without an answer"),
    ],
)
def test_a_child_that_is_killed_is_not_taken_for_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, said: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable} -I\nimport os, sys\n{end}\n")
    python.chmod(0o755)
    monkeypatch.setattr(loader_module, "python_with_bcc", lambda: str(python))
    loader = Loader()
    with pytest.raises(errors.HookError, match=said):
        loader.ask({})
    loader.end()


def test_a_child_that_hangs_without_its_socket_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As LLVM might at the exit."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable} -I\nimport os, signal\nos.closerange(3, 100)\nsignal.pause()\n")
    python.chmod(0o755)
    monkeypatch.setattr(loader_module, "python_with_bcc", lambda: str(python))
    monkeypatch.setattr(loader_module, "_EXIT_TIMEOUT_S", 0.1)
    loader = Loader()
    with pytest.raises(errors.HookError, match="the loader closed its socket without an answer"):
        loader.ask({})
    loader.end()
