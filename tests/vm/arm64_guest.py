"""Runs a command as root on an emulated arm64 machine with Debian 13.

The checkout is /checkout there; what the guest changes in it is lost, as on its disk. A folder of this machine is
/results. Its network has one other host, HOST, which is this machine's loopback. It ends with the process that started
it, however that ends.
"""

import contextlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.vm import kernels
from tests.support.vm.guest import ROOT, GuestError, Result
from tests.vm.arm64_image import BUSYBOX, DISK, SUITE, image

HOST = "10.0.2.2"
FLAVOR = "arm64"
"""Of the kernel, which has pages of 4 KiB."""

_BOOT_S = 240
_QEMU = "qemu-system-aarch64"
_PROGRAMS = (_QEMU, "apt-get", "cpio", "depmod", "modprobe", "mke2fs")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_MACHINE = "-machine virt -cpu cortex-a72 -accel tcg,thread=multi -smp 2 -m 3G -nographic -no-reboot -snapshot"
# No ROM: nothing boots from it.
_NETWORK = "-netdev user,id=net,ipv6=off -device virtio-net-pci,netdev=net,romfile="
_BOOT = "console=ttyAMA0 quiet loglevel=4 mitigations=off panic=-1"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "9pnet_virtio", "9p", "overlay")
_9P = "trans=virtio,version=9p2000.L,msize=524288"

_INIT = f"""\
#!/busybox sh
/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /busybox insmod $module; done
until [ -b /dev/vda ]; do /busybox sleep 0.1; done
/busybox mount -t ext4 /dev/vda /root
/busybox mount -t 9p -o {_9P} results /root/results
exec /busybox switch_root /root /bin/bash /results/script
"""

_SCRIPT = """\
export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
for folder in /dev/shm /run /tmp; do mount -t tmpfs tmpfs $folder; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t 9p -o ro,cache=loose,{options} modules /lib/modules
mkdir /run/checkout /run/upper /run/work
mount -t 9p -o ro,cache=loose,{options} checkout /run/checkout
mount -t overlay -o lowerdir=/run/checkout,upperdir=/run/upper,workdir=/run/work checkout /checkout
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0  # and no route to anywhere else
cd /checkout
status=0
timeout --kill-after=10 {timeout_s} bash /results/command >/results/output 2>&1 </dev/null || status=$?
echo $status >/results/status
sync
busybox poweroff -f
"""


def refusal() -> str | None:
    """Return why this machine cannot run the guest, or None if it can."""
    if os.geteuid() != 0:
        return "not root: the disk's files are root's"
    return kernels.refusal(_PROGRAMS, "--all")


def run(command: str, timeout_s: int, results: Path) -> Result:
    """Run a shell command in the checkout. What it writes into /results is in `results`.

    Raises:
        GuestError: The guest ended before the command did.
    """
    folder, kernel = image(), kernels.kernel_image(SUITE, FLAVOR)
    (results / "command").write_text(command + "\n")
    (results / "script").write_text(_SCRIPT.format(timeout_s=timeout_s, options=_9P))
    initrd = _initrd(kernel, folder / BUSYBOX, results)
    boot = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", _BOOT]
    drive = ["-drive", f"file={folder / DISK},format=raw,if=virtio"]
    shares = [*_share("results", results), *_share("checkout", ROOT, "readonly=on")]
    shares += _share("modules", kernel.parents[1] / "lib/modules", "readonly=on")
    machine = [*_MACHINE.split(), *_NETWORK.split()]
    # On a timeout, the command's status shows it.
    with (results / "console").open("wb") as console, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", _QEMU, *machine, *boot, *drive, *shares],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            timeout=_BOOT_S + timeout_s,
        )
    status = results / "status"
    if not status.exists():
        log = (results / "console").read_text(errors="replace")
        raise GuestError(f"the guest ended before the command did; its console:\n{log[-4000:]}")
    return Result(int(status.read_text()), (results / "output").read_text(errors="replace"))


def _share(tag: str, path: Path, *options: str) -> list[str]:
    value = ",".join([f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap", *options])
    return ["-virtfs", value]


def _initrd(kernel: Path, busybox: Path, folder: Path) -> Path:
    """Return an initial RAM disk that mounts the disk, with the modules for that."""
    with tempfile.TemporaryDirectory(prefix="rebpf-initrd-") as name:
        root = Path(name)
        for each in ("dev", "root", "modules"):
            (root / each).mkdir()
        shutil.copy(busybox, root / "busybox")
        (root / "init").write_text(_INIT)
        (root / "init").chmod(0o755)
        for number, module in enumerate(_modules(kernel)):
            (root / f"modules/{number:03}.ko").write_bytes(lzma.decompress(module.read_bytes()))
        initrd = folder / "initrd"
        pack = 'cd "$0" && find . | cpio --quiet -o -H newc >"$1"'
        subprocess.run(["sh", "-c", pack, root, initrd], check=True)
    return initrd


def _modules(kernel: Path) -> list[Path]:
    """Return the files of _MODULES and those that they need, in the order to load them."""
    version = kernel.name.removeprefix("vmlinuz-")
    query = ["modprobe", "--dirname", str(kernel.parents[1]), "--set-version", version, "--show-depends", "--all"]
    shown = subprocess.run([*query, *_MODULES], capture_output=True, text=True, check=True, env={"PATH": _PATH}).stdout
    found = [line.split()[1] for line in shown.splitlines() if line.startswith("insmod ")]
    return [Path(path) for path in dict.fromkeys(found)]


def kernel_btf() -> bytes:
    """Return the BTF of the kernel, the longest in its image: /sys/kernel/btf/vmlinux on its host."""
    image_file = kernels.kernel_image(SUITE, FLAVOR).read_bytes()
    found = []
    for match in re.finditer(b"\x9f\xeb\x01\x00\x18\x00\x00\x00", image_file):
        *_, strings_at, strings_bytes = struct.unpack_from("<5I", image_file, match.start() + 4)
        found.append(image_file[match.start() :][: 24 + strings_at + strings_bytes])
    return max(found, key=len)


if __name__ == "__main__":  # python -m tests.vm.arm64_guest COMMAND [SECONDS]
    with tempfile.TemporaryDirectory(prefix="rebpf-guest-") as results_folder:
        outcome = run(sys.argv[1], int((*sys.argv, 600)[2]), Path(results_folder))
    print(outcome.output, end="")
    sys.exit(outcome.status)
