"""A disk with Debian 13 for arm64 and the packages that ReBPF's depends on. Built once, then cached.

They are unpacked but not installed: none of their scripts runs, so that building the disk needs no emulated processor.
ReBPF, the kernel and its modules are not on it.
"""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.packages import SUITES
from tests.support.servers.fetch import cache, cached
from tests.support.vm.kernels import apt_options

SUITE = "trixie"
DISK, BUSYBOX = "disk", "busybox"

_PACKAGES = (
    *SUITES[SUITE]["debian"],
    *("libbpf1", "python3-bpfcc", "python3-pytest", "python3-pytest-timeout"),
    *("busybox-static", "ca-certificates", "ethtool", "iproute2", "kmod", "mount", "nftables", "procps"),
)
_SIZE = "3G"


def image() -> Path:
    """Return the folder with the disk and a static busybox. The first call builds it, in minutes."""
    made_of = [Path(__file__).read_text(), *_PACKAGES]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return cached(f"arm64-{SUITE}-{digest}", _fill)


def _fill(part: Path) -> None:
    for old in cache().glob(f"arm64-{SUITE}-*"):
        if old != part:
            shutil.rmtree(old)
    root = part / "root"
    root.mkdir()
    _unpack(root)
    for file in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{file}.master", root / "etc" / file)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for folder in ("checkout", "results", "lib/modules"):
        (root / folder).mkdir(exist_ok=True)
    _choose_alternatives(root)
    shutil.copy(root / "usr/bin/busybox", part / BUSYBOX)
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(part / DISK), _SIZE)
    shutil.rmtree(root)


def _unpack(root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".arm64-", dir=cache()) as name:
        work = Path(name)
        options = apt_options(SUITE, work, "arm64")
        _run("apt-get", "-qq", *options, "update")
        chosen = ["--no-install-recommends", "--download-only", "install", "?essential", *_PACKAGES]
        _run("apt-get", "-qq", *options, *chosen)
        # The first one has the links from / to /usr.
        packages = sorted(work.glob("cache/archives/*.deb"), key=lambda path: not path.name.startswith("base-files_"))
        for package in packages:
            extract = 'dpkg-deb --fsys-tarfile "$0" | tar -x --keep-directory-symlink -C "$1"'
            _run("bash", "-o", "pipefail", "-c", extract, str(package), str(root))


def _choose_alternatives(root: Path) -> None:
    """Link the libraries that numpy needs, which are the only ones of several packages."""
    libraries = root / "usr/lib/aarch64-linux-gnu"
    for name in ("blas/libblas.so.3", "lapack/liblapack.so.3"):
        (libraries / Path(name).name).symlink_to(name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
