"""Runs a command as root in a virtual machine with another kernel, over this machine's root file system, without KVM.

The guest sees the machine's files as they are, under overlays in its memory: what it writes is gone with it, but for one
folder, `results`. It ends by itself when the time is over, also if nobody waits for it any more.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kernels import kernel_image

ROOT = Path(__file__).resolve().parents[2]

_BOOT_S = 180  # generous: without KVM a loaded machine boots for a minute
_PROGRAMS = ("qemu-system-x86_64", "busybox", "modprobe", "udevadm")

_SCRIPT = """\
mount -t bpf bpf /sys/fs/bpf
cd {root}
timeout --kill-after=10 {timeout_s} bash {results}/command >{results}/output 2>&1
echo $? >{results}/status
sync
"""


class GuestError(Exception):
    """The guest ended, or was ended, before the command did."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left: 124 is the status of one that took longer than its time."""

    status: int
    output: str


def missing() -> list[str]:
    """Return what this machine lacks for a guest."""
    path = _path()
    return [program for program in (*_PROGRAMS, "vng") if not shutil.which(program, path=path)]


def run(suite: str, command: str, timeout_s: int, results: Path) -> Result:
    """Run a shell command with the kernel of `suite`; what it writes into `results` stays."""
    (results / "command").write_text(command + "\n")
    (results / "script").write_text(_SCRIPT.format(root=ROOT, timeout_s=timeout_s, results=results))
    machine = _boot(kernel_image(suite), f"bash {results}/script", results)
    try:
        console, _ = machine.communicate(timeout=_BOOT_S + timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(machine.pid, signal.SIGKILL)
        console, _ = machine.communicate()
    status = results / "status"
    if not status.exists():
        raise GuestError(f"the guest ended before the command did; its console:\n{console[-4000:]}")
    return Result(int(status.read_text()), (results / "output").read_text(errors="replace"))


def _boot(kernel: Path, command: str, results: Path) -> "subprocess.Popen[str]":
    machine = ["--disable-kvm", "--run", str(kernel), "--memory", "2G", "--cpus", "2", "--force-9p"]
    # Overlays for the folders that vng does not cover by itself.
    folders = ["--overlay-rwdir", str(ROOT), "--overlay-rwdir", "/root", "--rwdir", str(results)]
    return subprocess.Popen(
        ["vng", *machine, *folders, "--exec", command],
        cwd=ROOT,
        env={**os.environ, "PATH": _path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _path() -> str:
    """The venv's programs, and those of root: vng starts others by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


if __name__ == "__main__":  # guest.py SUITE COMMAND
    with tempfile.TemporaryDirectory(prefix="rebpf-guest-") as folder:
        outcome = run(sys.argv[1], sys.argv[2], 600, Path(folder))
    print(outcome.output, end="")
    sys.exit(outcome.status)
