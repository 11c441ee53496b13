"""Limits on processes, memory and descriptors: one line that names the limit, and no abort of a library."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from producer.host.exhausted import exhausted, hidden
from tests.support.rebpf import as_nobody, command, let_others_in

COMMANDS = (
    "check --local",
    "tail --json --brokers b:1",
    "init --brokers b:1",
    "alert --brokers b:1",
    "top --once --brokers b:1",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_host_without_threads_is_named(tmp_path: Path, words: str) -> None:
    (tmp_path / "rebpf.toml").write_text('[alert]\nlisten = ""\nstdout = true\n[[alert.rules]]\nname = "x"\n')
    (tmp_path / "rebpf.toml").chmod(0o644)
    let_others_in(tmp_path)
    alone = as_nobody(60_100 + os.getpid() % 4_000)  # the limit is on all processes of a user
    line = shlex.join([*alone, *command(*words.split(), "--config", tmp_path / "rebpf.toml")])
    limited = ["bash", "-c", f"ulimit -u 1; exec {line}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == "rebpf: the limit on processes and threads: raise TasksMax= of the unit, or ulimit -u\n"


TEST_BROKER = """
import os, resource, sys
from producer.config.librdkafka import client_settings
from producer.errors import UnavailableError
from producer.kafka.librdkafka import Producer
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
for _ in range(int(sys.argv[1])):
    os.close(taken.pop())
try:
    Producer(client_settings(None, {})).close()
    print("started")
except UnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("free", [0, 1, 2, 3, 10, 15, 16, 20])
def test_the_test_broker_names_a_lack_of_descriptors_and_aborts_nothing(free: int) -> None:
    done = subprocess.run([sys.executable, "-c", TEST_BROKER, str(free)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    few = "the limit on file descriptors: raise LimitNOFILE= of the unit, or ulimit -n"
    assert done.stdout == f"{few if free < 16 else 'started'}\n"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), "the limit on memory"),
        (OSError(errno.ENOMEM, "x"), "the limit on memory"),
        (BlockingIOError(errno.EAGAIN, "x"), "the limit on processes"),
        (OSError(errno.EMFILE, "x"), "the limit on file descriptors"),
        (OSError(errno.ENFILE, "x"), "the limit on file descriptors of the host"),
    ],
)
def test_each_limit_is_named(error: Exception, found: str) -> None:
    assert exhausted(error).startswith(found)


@pytest.mark.parametrize("error", [OSError(), OSError("x"), OSError(errno.EIO, "x"), RuntimeError("x"), ValueError()])
def test_other_errors_are_no_limits(error: Exception) -> None:
    assert exhausted(error) == ""


@pytest.mark.parametrize("words", ["run", "check --local", "trace", "tail --brokers b:1"])
@pytest.mark.parametrize("folder", ["/proc", "/sys"])
@pytest.mark.root
def test_a_host_without_proc_or_sys_is_named(tmp_path: Path, words: str, folder: str) -> None:
    (tmp_path / "rebpf.toml").write_text(f'state_dir = "{tmp_path}/state"\n')
    line = shlex.join(command(*words.split(), "--config", tmp_path / "rebpf.toml"))
    script = f"mount -t tmpfs none {folder} && exec {line}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode in (69, 77, 78), done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("words", ["run", "check --local"])
@pytest.mark.root
def test_a_host_without_its_boot_id_is_named_by_check_and_run(tmp_path: Path, words: str) -> None:
    line = shlex.join(command(*words.split(), "--state-dir", tmp_path / "state"))
    script = f"mount -t proc -o subset=pid none /proc && exec {line}"
    done = subprocess.run(["unshare", "-mpf", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 69
    assert "/proc/sys/kernel/random/boot_id: No such file or directory: mount /proc" in done.stdout + done.stderr


def test_a_file_of_the_kernel_that_is_missing_is_named() -> None:
    path = "/proc/sys/kernel/random/boot_id"
    assert hidden(FileNotFoundError(errno.ENOENT, "No such file", path)).startswith(
        f"{path}: No such file: mount /proc"
    )
    assert hidden(PermissionError(errno.EACCES, "Permission denied", "/sys/x")).startswith("/sys/x: Permission denied")
    assert hidden(FileNotFoundError(errno.ENOENT, "No such file", "/home/x")) == ""
    assert hidden(OSError(errno.EIO, "x", "/proc/x")) == ""
