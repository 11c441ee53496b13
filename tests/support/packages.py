"""The Debian package, built from the checkout."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build_deb(suite: str, folder: Path, revision: str) -> Path:
    """Build the package of a suite into a folder, and return its path."""
    command = [sys.executable, ROOT / "deploy/packaging/build-deb", suite, folder, revision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])
