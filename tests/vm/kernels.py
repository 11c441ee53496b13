"""Debian's kernel of a suite, unpacked into the cache and never installed.

The suite's own package lists are fetched into a folder that is thrown away: the machine's apt state stays as it is. The
mirror is the one that the machine's apt is configured with.
"""

import fcntl
import subprocess
import tempfile
from pathlib import Path

from tests.servers.fetch import cache

KEYRINGS = Path("/usr/share/keyrings")


def kernel_image(suite: str) -> Path:
    """Return the kernel image of `suite`, with its modules under ../lib/modules; fetched at the first call.

    Raises LookupError where apt knows no Debian mirror.
    """
    folder = cache() / "kernels" / suite
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{suite}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(suite, folder)
    return next(folder.glob("boot/vmlinuz-*"))


def _fetch(suite: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{suite}-", dir=folder.parent) as name:
        work = Path(name)
        options = apt_options(suite, work)
        _run(["apt-get", "-qq", *options, "update"], work)
        meta = _run(["apt-cache", *options, "depends", "linux-image-amd64"], work)
        package = next(line.split()[1] for line in meta.splitlines() if "Depends: linux-image-" in line)
        _run(["apt-get", "-qq", *options, "download", package], work)
        _run(["dpkg", "-x", str(next(work.glob("*.deb"))), "unpacked"], work)
        _index_modules(work / "unpacked")
        (work / "unpacked").rename(folder)


def _index_modules(root: Path) -> None:
    """Make the modules' index, which a package's installation makes otherwise."""
    # Old packages have /lib, new ones /usr/lib; so have the kmods that look for the modules there.
    (root / "usr").mkdir(exist_ok=True)
    for place, target in ((root / "lib", "usr/lib"), (root / "usr/lib", "../lib")):
        if not place.exists():
            place.symlink_to(target)
    version = next(root.glob("boot/vmlinuz-*")).name.removeprefix("vmlinuz-")
    _run(["depmod", "-b", str(root), version])


def apt_options(suite: str, work: Path) -> list[str]:
    """Return apt's options that make it know the packages of `suite`, with all that it keeps in a folder."""
    (work / "lists/partial").mkdir(parents=True)
    (work / "cache/archives/partial").mkdir(parents=True)
    keyring = next(iter(sorted(KEYRINGS.glob("debian-archive-keyring.*"))), None)
    signed_by = f"[signed-by={keyring}] " if keyring else ""
    (work / "sources.list").write_text(f"deb {signed_by}{debian_mirror()} {suite} main\n")
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",  # apt's own user cannot write into the folder
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def debian_mirror() -> str:
    for line in _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL) $(SUITE)"]).splitlines():
        uri, _, rest = line.partition(" ")
        label, _, suite = rest.rpartition(" ")
        if label == "Debian" and "-" not in suite:
            return uri
    raise LookupError("apt is configured with no Debian mirror, or `apt-get update` has not run yet")


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
