"""A disk image of a Debian suite that boots systemd and runs one command. Built once, then cached.

It contains the dependencies of ReBPF's package, but not ReBPF. The package and the checkout are added when it boots
(tests.vm.systemd_guest).
"""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.servers.fetch import cache, cached
from tests.support.vm.guest import TIED
from tests.support.vm.kernels import KEYRINGS, debian_mirror

DISK, KERNEL, INITRD = "disk", "vmlinuz", "initrd"

# Packages that make it a host, and those that the tests run.
_HOST = ("systemd-sysv", "dbus", "udev", "kmod", "procps", "iproute2", "ca-certificates", "linux-image-amd64")
_SIZE = "4G"  # it takes half of that

_FSTAB = """\
/dev/vda / ext4 defaults 0 1
checkout /checkout 9p ro,trans=virtio,version=9p2000.L,cache=loose,msize=524288 0 0
results /results 9p trans=virtio,version=9p2000.L,msize=524288 0 0
"""

_COMMAND_UNIT = """\
[Unit]
RequiresMountsFor=/checkout /results
After=multi-user.target
[Service]
Type=oneshot
WorkingDirectory=/checkout
ExecStart=/bin/sh -c 'bash /results/command >/results/output 2>&1; echo $$? >/results/status'
ExecStopPost=/bin/systemctl poweroff --no-block
[Install]
WantedBy=graphical.target
"""


def dependencies(package: Path) -> list[str]:
    """Return the names of the Debian packages that a package depends on or recommends; of alternatives, the first."""
    depends = [
        entry
        for field in ("Depends", "Recommends")
        for entry in _run("dpkg-deb", "--field", str(package), field).split(",")
    ]
    return sorted({re.split(r"[ (|:]", entry.strip(), maxsplit=1)[0] for entry in depends})


def image(suite: str, packages: Sequence[str]) -> Path:
    """Return the folder with the disk, the kernel and its initial RAM disk. The first call builds it, in minutes."""
    made_of = [Path(__file__).read_text(), *packages]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return cached(f"systemd-{suite}-{digest}", lambda part: _fill(suite, packages, part))


def _fill(suite: str, packages: Sequence[str], part: Path) -> None:
    for old in cache().glob(f"systemd-{suite}-*"):
        if old != part:
            shutil.rmtree(old)
    root = part / "root"
    keyring = KEYRINGS / "debian-archive-keyring.gpg"
    options = ["--variant=minbase", f"--include={','.join(_HOST)}", f"--keyring={keyring}"]
    # In separate namespaces, so that its mounts end with it, however it ends.
    _run(*TIED, "debootstrap", *options, suite, str(root), debian_mirror())
    # By apt, because debootstrap does not resolve virtual packages.
    install = f"apt-get -qq update && apt-get -qq install --no-install-recommends {' '.join(packages)}"
    into = 'mount -t proc proc "$0/proc" && DEBIAN_FRONTEND=noninteractive exec chroot "$0" sh -ec "$1"'
    _run(*TIED, "sh", "-ec", into, str(root), install)
    _configure(root)
    shutil.copy(next(root.glob("boot/vmlinuz-*")), part / KERNEL)
    shutil.copy(next(root.glob("boot/initrd.img-*")), part / INITRD)
    for package in root.glob("var/cache/apt/archives/*.deb"):
        package.unlink()
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(part / DISK), _SIZE)
    shutil.rmtree(root)


def _configure(root: Path) -> None:
    (root / "etc/fstab").write_text(_FSTAB)
    for folder in ("checkout", "results"):
        (root / folder).mkdir()
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")  # the disk ends with the machine
    (root / "etc/systemd/system/command.service").write_text(_COMMAND_UNIT)
    _run("chroot", str(root), "systemctl", "enable", "command.service")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
