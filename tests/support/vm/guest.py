"""Runs a command as root in a virtual machine with another kernel, over this machine's root file system, without KVM.

The guest sees the machine's files under overlays in its memory: its changes end with it, except in one folder,
`results`. It ends with the process that started it, however that ends.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.vm.kernels import kernel_image

ROOT = Path(__file__).resolve().parents[3]

_BOOT_S = 180  # generous: without KVM a loaded machine boots for a minute
_PROGRAMS = ("vng", "qemu-system-x86_64", "busybox", "modprobe", "udevadm", "file", "apt-get")
# The venv's programs, and root's: vng starts others by name.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# An old processor: QEMU emulates the newest that it knows, AVX included, in nearly twice the time. And vng mounts the
# root without a cache, over which Python starts three times slower.
_QEMU = (
    "-cpu Nehalem -fsdev local,id=cached,path=/,security_model=none,readonly=on,multidevs=remap"
    " -device virtio-9p-pci,fsdev=cached,mount_tag=cached"
)
# A console for the kernel's messages: vng discards those on its own console.
_KERNEL_LOG = "kernel.log"

# vng starts QEMU through a shell and another program: they end together, and with us, as a PID namespace does.
TIED = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

_SCRIPT = """\
set -e
mkdir -p /run/cached /run/usr/upper /run/usr/work
mount -t 9p -o ro,cache=loose,trans=virtio,version=9p2000.L,access=any,msize=524288 cached /run/cached
mount -t overlay -o lowerdir=/run/cached/usr,upperdir=/run/usr/upper,workdir=/run/usr/work usr /usr
mkdir -p /lib/modules
mount --bind /run/cached{venv} {venv}
mount --bind /run/cached{modules} /lib/modules
mount -t bpf bpf /sys/fs/bpf
cd {root}
status=0
timeout --kill-after=10 {timeout_s} bash {results}/command >{results}/output 2>&1 || status=$?
echo $status >{results}/status
"""


class GuestError(Exception):
    """The guest ended before the command did."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a command; status 124 means that it timed out."""

    status: int
    output: str


def refusal() -> str | None:
    """Return why this machine cannot run a guest, or None if it can."""
    if platform.machine() != "x86_64":
        return "the kernels are those of x86-64"
    if os.geteuid() != 0:
        return "not root: the guest's root would not be allowed to read root's files"
    if absent := [program for program in _PROGRAMS if not shutil.which(program, path=_PATH)]:
        return f"no {', '.join(absent)} (scripts/setup --tests installs them)"
    return None


def run(suite: str, command: str, timeout_s: int, results: Path) -> Result:
    """Run a shell command with the kernel of `suite`. Files that it writes into `results` remain.

    An emulated kernel can die of itself: the guest is booted a second time then, and the first end is printed.

    Raises:
        GuestError: The guest ended twice before the command did.
    """
    try:
        return _run(suite, command, timeout_s, results)
    except GuestError as error:
        print(f"BOOTED A SECOND TIME: {error}", file=sys.stderr)
        return _run(suite, command, timeout_s, results)


def _run(suite: str, command: str, timeout_s: int, results: Path) -> Result:
    kernel = kernel_image(suite)
    script = _SCRIPT.format(
        venv=sys.prefix, modules=kernel.parents[1] / "lib/modules", root=ROOT, timeout_s=timeout_s, results=results
    )
    (results / "command").write_text(command + "\n")
    (results / "script").write_text(script)
    with _boot(kernel, f"bash {results}/script", results) as machine:
        try:
            console, _ = machine.communicate(timeout=_BOOT_S + timeout_s)
        except subprocess.TimeoutExpired:
            machine.kill()
            console, _ = machine.communicate()
        finally:
            machine.kill()
    status = results / "status"
    if not status.exists():
        messages = (results / _KERNEL_LOG).read_text(errors="replace") if (results / _KERNEL_LOG).exists() else ""
        raise GuestError(
            f"the guest ended before the command did, with {machine.returncode}; its console:\n{console[-4000:]}\n"
            f"its kernel's messages:\n{messages[-8000:]}"
        )
    return Result(int(status.read_text()), (results / "output").read_text(errors="replace"))


def _boot(kernel: Path, command: str, results: Path) -> "subprocess.Popen[str]":
    machine = ["--disable-kvm", "--run", str(kernel), "--memory", "4G", "--cpus", "2"]
    log = f"-chardev file,id=log,path={results / _KERNEL_LOG} -device virtio-serial-pci -device virtconsole,chardev=log"
    tuning = ["--force-9p", f"--qemu-opts={_QEMU} {log}", "--append=mitigations=off loglevel=5 console=hvc0"]
    # Overlays for the folders that vng does not cover by itself.
    folders = ["--overlay-rwdir", str(ROOT), "--overlay-rwdir", "/root", "--rwdir", str(results)]
    return subprocess.Popen(
        [*TIED, "vng", *machine, *tuning, *folders, "--exec", command],
        cwd=ROOT,
        env={**os.environ, "PATH": _PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":  # python -m tests.support.vm.guest SUITE COMMAND [SECONDS]
    with tempfile.TemporaryDirectory(prefix="rebpf-guest-") as folder:
        outcome = run(sys.argv[1], sys.argv[2], int((*sys.argv, 600)[3]), Path(folder))
    print(outcome.output, end="")
    sys.exit(outcome.status)
