"""What the packages of all distributions have in common: their files, and how a build runs."""

import gzip
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import licenses
import wheels
from wheels import HERE, ROOT

PRIVATE = "usr/lib/rebpf"
DOCUMENT = "usr/share/doc/rebpf"
_EXAMPLES = ("flink", "grafana", "kubernetes", "profiles", "prometheus")
# Files of other wheels that are not used at run time; and files of pip with paths of this machine.
_NOT_RUN = (
    *("bin", "**/tests", "**/include", "**/*.pyi", "**/*.pyx", "**/*.pxd", "**/*.[acho]"),
    *("numpy/distutils", "numpy/f2py"),
)
_NOT_INSTALLED = ("bin", *(f"*.dist-info/{name}" for name in ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json")))


def install_programs(root: Path, release: str, python: str, machine: str, tools: Path) -> None:
    """Install the program, and the wheels of a release's lock file for its version of Python and a machine."""
    private = root / PRIVATE
    target = wheels.target(python, machine)
    wheels.install(private, release, *target)
    write(root / DOCUMENT / "copyright", licenses.copyright_file((ROOT / "LICENSE").read_text(), private))
    _leave_out(private, _NOT_RUN)
    with tempfile.TemporaryDirectory(prefix="rebpf-wheel-") as name:
        build = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", name)
        run(*build, cwd=ROOT, PYTHONPATH=str(tools), **_compiler(machine))
        wheel = next(Path(name).glob("*.whl"))
        wheels.pip("install", "--target", str(private), "--no-compile", "--no-deps", *target, str(wheel))
    _leave_out(private, _NOT_INSTALLED)


def _compiler(machine: str) -> dict[str, str]:
    """Return the environment that compiles for another machine; empty for this one."""
    if machine == platform.machine():
        return {}
    # The second variable is Python's own, for compilations for another machine.
    return {"CC": os.environ.get("CC", f"{machine}-linux-gnu-gcc"), "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}


def _leave_out(private: Path, patterns: tuple[str, ...]) -> None:
    for path in [path for pattern in patterns for path in private.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def install_pages(root: Path, tools: Path, completions: Mapping[str, str]) -> None:
    """Generate manual pages and completions from the command line, in a Python that has click."""
    pages = tools.with_name("pages")
    pages.mkdir()
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch()))
    path = os.pathsep.join([str(tools), str(ROOT)])
    run(sys.executable, "-B", HERE / "manpages.py", str(wheels.project()["version"]), date, pages, PYTHONPATH=path)
    for section, name in ((1, "rebpf.1"), (5, "rebpf.toml.5")):
        write_gz(root / f"usr/share/man/man{section}/{name}.gz", (pages / name).read_bytes())
    for shell, place in completions.items():
        write(root / place, (pages / shell).read_text())


def install_documents(root: Path) -> None:
    """Install the changelog, the documents, the schemas and the examples.

    The folders are those of the checkout, so that links work, and flink/ddl.py finds the schemas.
    """
    write_gz(root / DOCUMENT / "changelog.gz", (ROOT / "CHANGELOG.md").read_bytes())
    for pattern in ("README.md", "docs/*.md", "docs/*.ipynb", "schemas/*.avsc"):
        for path in sorted(ROOT.glob(pattern)):
            write(root / DOCUMENT / path.relative_to(ROOT), path.read_text())
    for path in sorted(path for name in _EXAMPLES for path in (ROOT / "deploy" / name).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            write(root / DOCUMENT / "examples" / path.relative_to(ROOT / "deploy"), path.read_text())


def normalize(root: Path) -> None:
    """Set the time of each file to the last commit, and its mode independent of the umask."""
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
        elif path.relative_to(root).parts[:3] == ("usr", "lib", "rebpf"):
            path.chmod(0o644)
        os.utime(path, (epoch(), epoch()))


def epoch() -> int:
    """Return the time of all files, in seconds since 1970: that of the last commit if it is not set."""
    if "SOURCE_DATE_EPOCH" not in os.environ:
        os.environ["SOURCE_DATE_EPOCH"] = _commit_time()
    return int(os.environ["SOURCE_DATE_EPOCH"])


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file with this mode, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def write_gz(path: Path, data: bytes) -> None:
    """Write a compressed file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    path.chmod(0o644)


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command. Its output goes to standard error; standard output is for the package's path."""
    words = [str(word) for word in command]
    subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, stdout=sys.stderr, check=True)


def _commit_time() -> str:
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() or sys.exit("cannot get the time of the last commit: set SOURCE_DATE_EPOCH")
