"""A disk image of a Debian suite that boots its systemd and runs one command: built once, and kept in the cache.

In it is what ReBPF stands on, but not ReBPF: the distribution's packages, Python's in /usr/lib/rebpf, the service's
user. The checkout comes in when it boots (tests.vm.systemd_guest). `python -m tests.vm.systemd_image SUITE` builds it.
"""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.servers.fetch import cache, cached
from tests.vm.guest import TIED
from tests.vm.kernels import KEYRINGS, debian_mirror

ROOT = Path(__file__).resolve().parents[2]
DISK, KERNEL, INITRD = "disk", "vmlinuz", "initrd"

_PACKAGES = "systemd-sysv,dbus,udev,kmod,procps,iproute2,nftables,ca-certificates,linux-image-amd64,python3-bpfcc"
_SIZE = "4G"  # it takes half of that
_WHEELS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")

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

# What a package will install, of the files in /usr/lib/rebpf.
_REBPF = """\
#!/usr/bin/python3
import sys
sys.path.insert(0, "/usr/lib/rebpf")
from producer.cli import main
main()
"""


def image(suite: str) -> Path:
    """Return the folder with the disk, the kernel and its initial RAM disk; built at the first call, in minutes."""
    made_of = [Path(__file__).read_text(), *_requirements()]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return cached(f"systemd-{suite}-{digest}", lambda part: _fill(suite, part))


def _fill(suite: str, part: Path) -> None:
    for old in cache().glob(f"systemd-{suite}-*"):
        if old != part:
            shutil.rmtree(old)
    root = part / "root"
    keyring = KEYRINGS / "debian-archive-keyring.gpg"
    options = ["--variant=minbase", f"--include={_PACKAGES}", f"--keyring={keyring}"]
    # In namespaces of its own: the file systems that it mounts in there go with it, whatever ends it.
    _run(*TIED, "debootstrap", *options, suite, str(root), debian_mirror())
    _run("chroot", str(root), "useradd", "--system", "--no-create-home", "--shell=/usr/sbin/nologin", "rebpf")
    _install_wheels(root)
    _configure(root)
    shutil.copy(next(root.glob("boot/vmlinuz-*")), part / KERNEL)
    shutil.copy(next(root.glob("boot/initrd.img-*")), part / INITRD)
    shutil.rmtree(root / "var/cache/apt")
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(part / DISK), _SIZE)
    shutil.rmtree(root)


def _install_wheels(root: Path) -> None:
    """Install what pyproject.toml asks for, for the image's Python, by ours: no network is needed inside."""
    version = _run("chroot", str(root), "python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    target = ["--python-version", version, *(word for wheel in _WHEELS for word in ("--platform", wheel))]
    place = ["--target", str(root / "usr/lib/rebpf"), "--no-compile", "--only-binary=:all:"]
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-input", *place, *target, *_requirements())
    _run("chroot", str(root), "python3", "-m", "compileall", "-q", "/usr/lib/rebpf")


def _configure(root: Path) -> None:
    (root / "etc/fstab").write_text(_FSTAB)
    for folder in ("checkout", "results"):
        (root / folder).mkdir()
    (root / "etc/systemd/system/command.service").write_text(_COMMAND_UNIT)
    _run("chroot", str(root), "systemctl", "enable", "command.service")
    program = root / "usr/bin/rebpf"
    program.write_text(_REBPF)
    program.chmod(0o755)


def _requirements() -> list[str]:
    dependencies: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dependencies


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    print(image(sys.argv[1]))
