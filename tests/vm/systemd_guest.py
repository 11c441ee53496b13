"""Runs a command as root in a virtual machine that has booted systemd, without KVM.

The checkout is /checkout there, read-only, and a folder of this machine is /results. All other changes are lost with
the machine, which ends with the process that started it, however that ends. Its network has one other host,
HOST, which is this machine's loopback.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.vm import kernels
from tests.support.vm.guest import ROOT, GuestError, Result
from tests.vm.systemd_image import DISK, INITRD, KERNEL, image

_BOOT_S = 240
_PROGRAMS = ("qemu-system-x86_64", "debootstrap", "mke2fs", "chroot")
# An old processor: QEMU emulates the newest that it knows, AVX included, in nearly twice the time.
_MACHINE = "-accel tcg,thread=multi -cpu Nehalem -smp 2 -m 2G -nographic -no-reboot -snapshot"
# No ROM: nothing boots from it.
_NETWORK = "-netdev user,id=net,ipv6=off -device virtio-net-pci,netdev=net,romfile="
HOST = "10.0.2.2"
_JOIN = "ip link set eth0 up && ip address add 10.0.2.15/24 dev eth0"  # and no route to anywhere else
_BOOT = "root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0 systemd.show_status=0"


def refusal() -> str | None:
    """Return why this machine cannot run a systemd guest, or None if it can."""
    if platform.machine() != "x86_64":
        return "the image is of x86-64"
    if os.geteuid() != 0:
        return "not root: debootstrap needs it"
    return kernels.refusal(_PROGRAMS, "--tests")


def run(suite: str, packages: Sequence[str], command: str, timeout_s: int, results: Path) -> Result:
    """Run a shell command on a host of `suite` with these Debian packages, in the checkout.

    What it writes into /results stays in `results`.
    """
    folder = image(suite, packages)
    (results / "command").write_text(f"{_JOIN} && timeout --kill-after=10 {timeout_s} {command}\n")
    machine = [*_MACHINE.split(), *_NETWORK.split()]
    kernel = ["-kernel", folder / KERNEL, "-initrd", folder / INITRD, "-append", _BOOT]
    drive = ["-drive", f"file={folder / DISK},format=raw,if=virtio"]
    checkout = ["-virtfs", f"local,path={ROOT},mount_tag=checkout,security_model=none,readonly=on,multidevs=remap"]
    shared = ["-virtfs", f"local,path={results},mount_tag=results,security_model=none"]
    tied = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    with (results / "console").open("wb") as console:
        try:
            whole = [*tied, *machine, *map(str, kernel), *drive, *checkout, *shared]
            subprocess.run(
                whole, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, timeout=_BOOT_S + timeout_s
            )
        except subprocess.TimeoutExpired:
            pass  # the command's status shows it
    status = results / "status"
    if not status.exists():
        log = (results / "console").read_text(errors="replace")
        raise GuestError(f"the guest ended before the command did; its console:\n{log[-4000:]}")
    return Result(int(status.read_text()), (results / "output").read_text(errors="replace"))
