"""The wheels of a package: which ones (SUITE.lock), and their installation into a folder for a suite's Python.

A lock file has pip's own format, with hashes: a package that is built again has the same bytes, whatever was published
meanwhile. `./lock` writes them.
"""

import os
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOLS = "tools"
"""Name of the lock file of what a build runs, on the Python of the machine that it runs on."""

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""The machines that the Debian packages are built for, by Debian's names."""

_PLATFORMS = ("manylinux_2_28_{}", "manylinux_2_27_{}", "manylinux_2_17_{}", "manylinux2014_{}", "linux_{}", "any")


def suites() -> dict[str, Any]:
    """Return suites.toml."""
    return tomllib.loads((HERE / "suites.toml").read_text())


def releases() -> dict[str, Any]:
    """Return releases.toml."""
    return tomllib.loads((HERE / "releases.toml").read_text())


def project() -> dict[str, Any]:
    """Return the project's table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def lock_file(name: str) -> Path:
    """Return the lock file of a suite, or of the tools."""
    return HERE / f"{name}.lock"


def target(python: str, machine: str) -> list[str]:
    """Return pip's options to choose wheels for another machine and version of Python."""
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform.format(machine))]
    return ["--python-version", python, "--implementation", "cp", *platforms]


def install(folder: Path, name: str, *options: str) -> None:
    """Install the packages of a lock file into `folder`."""
    wanted = ["--require-hashes", "--no-deps", "--requirement", str(lock_file(name))]
    pip("install", "--target", str(folder), "--no-compile", "--only-binary=:all:", *options, *wanted)


def pip(*arguments: str) -> None:
    """Run pip with its output on standard error."""
    own = ["--quiet", "--disable-pip-version-check", "--no-input"]
    # Root is fine: nothing is installed into this machine's Python.
    quiet = ["--root-user-action=ignore"] if arguments[0] == "install" else []
    command = [_python_with_pip(), "-m", "pip", *own, arguments[0], *quiet, *arguments[1:]]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


@cache
def _python_with_pip() -> str:
    """Return this Python, or that of the checkout if this one has no pip."""
    for python in (sys.executable, str(ROOT / ".venv/bin/python")):
        if os.path.exists(python) and subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0:
            return python
    sys.exit("build-deb: no pip: apt-get install python3-pip, or scripts/setup")
