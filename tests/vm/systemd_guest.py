"""Runs a command as root in a virtual machine that has booted a systemd of its own, without KVM.

The checkout is /checkout there, read-only, and one folder of this machine is /results. What else the command changes is
gone with the machine, which ends with the process that started it, however that ends.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm.guest import ROOT, GuestError, Result
from tests.vm.kernels import KEYRINGS, debian_mirror
from tests.vm.systemd_image import DISK, INITRD, KERNEL, image

_BOOT_S = 240
_PROGRAMS = ("qemu-system-x86_64", "debootstrap", "mke2fs", "chroot")
# An old processor: QEMU emulates the newest that it knows, AVX included, in nearly twice the time.
_MACHINE = "-accel tcg,thread=multi -cpu Nehalem -smp 2 -m 2G -nographic -no-reboot -snapshot -nic none"
_BOOT = "root=/dev/vda rw console=ttyS0 quiet mitigations=off systemd.show_status=0"


def refusal() -> str | None:
    """Return why this machine cannot run such a guest, or None if it can."""
    if platform.machine() != "x86_64":
        return "the image is of x86-64"
    if os.geteuid() != 0:
        return "not root: debootstrap needs it"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    if absent := [program for program in _PROGRAMS if not shutil.which(program, path=path)]:
        return f"no {', '.join(absent)} (scripts/setup --tests installs them)"
    if not (KEYRINGS / "debian-archive-keyring.gpg").exists():
        return "no debian-archive-keyring (scripts/setup --tests installs it)"
    try:
        debian_mirror()
    except LookupError as error:
        return str(error)
    return None


def run(suite: str, command: str, timeout_s: int, results: Path) -> Result:
    """Run a shell command on a host of `suite`, in the checkout; what it writes into /results stays in `results`."""
    folder = image(suite)
    (results / "command").write_text(f"timeout --kill-after=10 {timeout_s} {command}\n")
    machine = [*_MACHINE.split(), "-kernel", folder / KERNEL, "-initrd", folder / INITRD, "-append", _BOOT]
    drive = ["-drive", f"file={folder / DISK},format=raw,if=virtio"]
    checkout = ["-virtfs", f"local,path={ROOT},mount_tag=checkout,security_model=none,readonly=on,multidevs=remap"]
    shared = ["-virtfs", f"local,path={results},mount_tag=results,security_model=none"]
    tied = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    with (results / "console").open("wb") as console:
        try:
            whole = [*tied, *map(str, machine), *drive, *checkout, *shared]
            subprocess.run(
                whole, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, timeout=_BOOT_S + timeout_s
            )
        except subprocess.TimeoutExpired:
            pass  # the command's status tells
    status = results / "status"
    if not status.exists():
        log = (results / "console").read_text(errors="replace")
        raise GuestError(f"the guest ended before the command did; its console:\n{log[-4000:]}")
    return Result(int(status.read_text()), (results / "output").read_text(errors="replace"))


if __name__ == "__main__":  # python -m tests.vm.systemd_guest SUITE COMMAND
    with tempfile.TemporaryDirectory(prefix="rebpf-guest-") as name:
        outcome = run(sys.argv[1], sys.argv[2], 600, Path(name))
    print(outcome.output, end="")
    sys.exit(outcome.status)
