"""Debian packages, unpacked into the cache instead of installed, since installed ones start a service."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.servers.fetch import cached


def package(name: str) -> Path:
    """Return the root of a package's files; LookupError if apt does not have it."""
    return cached(f"package-{name}", lambda part: _fill(part, name))


def _fill(part: Path, name: str) -> None:
    if shutil.which("apt-get") is None:
        raise LookupError(f"there is no apt-get to fetch {name} with")
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        # apt's own user cannot write into the folder.
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise LookupError(f"apt-get download {name}: {done.stderr.strip()}")
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, part], check=True)
