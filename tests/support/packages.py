"""The Debian and RPM packages, built from the checkout, also for arm64."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tests.support.servers.fetch import cache, cached
from tests.support.vm.kernels import apt_options

ROOT = Path(__file__).resolve().parents[2]
SUITES = tomllib.loads((ROOT / "deploy/packaging/suites.toml").read_text())
COMPILER = "aarch64-linux-gnu-gcc"
X86_64, AARCH64 = 62, 183
"""e_machine of ELF files."""


def build_deb(suite: str, folder: Path, revision: str) -> Path:
    """Build the package of a suite into a folder, and return its path."""
    return _build("build-deb", [suite, folder, revision], {})


def build_arm64_deb(suite: str, folder: Path) -> Path:
    """Build the package of a suite for arm64 into a folder, and return its path."""
    return _build("build-deb", [suite, folder, "--arch", "arm64"], {"CFLAGS": _arm64_flags(suite)})


def build_arm64_rpm(release: str, folder: Path) -> Path:
    """Build the package of a release for arm64 into a folder, and return its path."""
    # The native module has Python's stable ABI: headers of any version do.
    return _build("build-rpm", [release, folder, "--arch", "aarch64"], {"CFLAGS": _arm64_flags("trixie")})


def unpack_rpm(package: Path, root: Path) -> None:
    """Unpack a package into a new folder."""
    root.mkdir()
    content = subprocess.run(["rpm2cpio", package], capture_output=True, check=True).stdout
    unpack = ["cpio", "--extract", "--make-directories", "--quiet", "--no-absolute-filenames"]
    subprocess.run(unpack, input=content, cwd=root, check=True)


def machines(folder: Path) -> dict[str, int]:
    """Return the processor (e_machine) of each ELF file in a folder, by its path."""
    data = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: int.from_bytes(text[18:20], "little") for name, text in data.items() if text.startswith(b"\x7fELF")}


def arm64_refusal() -> str | None:
    """Return why this machine cannot build for arm64, or None if it can."""
    return None if shutil.which(COMPILER) else f"no {COMPILER} (scripts/setup --all installs it)"


def _arm64_flags(suite: str) -> str:
    include = _arm64_headers(suite) / "usr/include"
    return f"-I{include}/python{SUITES[suite]['python']} -I{include}"


def _build(program: str, arguments: list[str | Path], environment: dict[str, str]) -> Path:
    command = [sys.executable, ROOT / "deploy/packaging" / program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def _arm64_headers(suite: str) -> Path:
    """Return a root with Python's headers for arm64, which this machine could only install as a foreign package."""

    def fill(part: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".headers-", dir=cache()) as name:
            work = Path(name)
            apt = ["apt-get", "-qq", *apt_options(suite, work, "arm64")]
            subprocess.run([*apt, "update"], check=True, capture_output=True)
            package = f"libpython{SUITES[suite]['python']}-dev"
            subprocess.run([*apt, "download", package], check=True, capture_output=True, cwd=work)
            subprocess.run(["dpkg", "-x", *work.glob("*.deb"), part], check=True)

    return cached(f"python-headers-{suite}-arm64", fill)
