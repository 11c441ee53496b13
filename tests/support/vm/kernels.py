"""A suite's Debian kernel, unpacked into the cache but not installed.

The suite's package lists are fetched into a temporary folder, so the machine's apt state does not change. The mirror is
the one in the machine's apt configuration.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.support.servers.fetch import cache

KEYRINGS = Path("/usr/share/keyrings")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def refusal(programs: Sequence[str], option: str) -> str | None:
    """Return what a guest of Debian's packages lacks here, or None; scripts/setup with `option` installs programs."""
    if absent := [program for program in programs if not shutil.which(program, path=_PATH)]:
        return f"no {', '.join(absent)} (scripts/setup {option} installs them)"
    if not (KEYRINGS / "debian-archive-keyring.gpg").exists():
        return "no debian-archive-keyring (scripts/setup --tests installs it)"
    try:
        debian_mirror()
    except LookupError as error:
        return str(error)
    return None


def kernel_image(suite: str, flavor: str = "amd64") -> Path:
    """Return the kernel image of `suite`, with its modules under ../lib/modules; fetched at the first call.

    `flavor` is the end of its package's name, and begins with the architecture. Raises LookupError if apt has no Debian
    mirror.
    """
    name = suite if flavor == "amd64" else f"{suite}-{flavor}"
    folder = cache() / "kernels" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(suite, flavor, folder)
    return next(folder.glob("boot/vmlinuz-*"))


def _fetch(suite: str, flavor: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{suite}-", dir=folder.parent) as name:
        work = Path(name)
        options = apt_options(suite, work, flavor.partition("-")[0])
        _run(["apt-get", "-qq", *options, "update"], work)
        (image,) = _dependencies(f"linux-image-{flavor}", "linux-image-", options, work)
        version = image.removeprefix("linux-image-")
        # Since Linux 6.19 the image's package is empty, and these others have its content.
        parts = [part for part in _dependencies(image, "linux-", options, work) if part.endswith(f"-{version}")]
        _run(["apt-get", "-qq", *options, "download", image, *parts], work)
        for package in work.glob("*.deb"):
            _run(["dpkg", "-x", str(package), "unpacked"], work)
        _place_image(work / "unpacked", version)
        _index_modules(work / "unpacked", version)
        (work / "unpacked").rename(folder)


def _dependencies(package: str, prefix: str, options: list[str], work: Path) -> list[str]:
    lines = _run(["apt-cache", *options, "depends", package], work).splitlines()
    return [line.split()[1] for line in lines if line.strip().startswith(f"Depends: {prefix}")]


def _place_image(root: Path, version: str) -> None:
    """Put the image into /boot, where the split packages' scripts copy it at an installation."""
    image = root / f"boot/vmlinuz-{version}"
    if not image.exists():
        image.parent.mkdir(exist_ok=True)
        shutil.copy(root / f"usr/lib/modules/{version}/vmlinuz", image)


def _index_modules(root: Path, version: str) -> None:
    """Build the modules' index, which installing a package would do."""
    # Old packages have /lib, new ones /usr/lib; so have the kmods that look for the modules there.
    (root / "usr").mkdir(exist_ok=True)
    for place, target in ((root / "lib", "usr/lib"), (root / "usr/lib", "../lib")):
        if not place.exists():
            place.symlink_to(target)
    _run(["depmod", "-b", str(root), version])


def apt_options(suite: str, work: Path, architecture: str | None = None) -> list[str]:
    """Return apt options for the packages of `suite`, with all of apt's state in a folder.

    With an architecture, they are for a machine of that architecture on which nothing is installed.
    """
    (work / "lists/partial").mkdir(parents=True)
    (work / "cache/archives/partial").mkdir(parents=True)
    keyring = next(iter(sorted(KEYRINGS.glob("debian-archive-keyring.*"))), None)
    signed_by = f"[signed-by={keyring}] " if keyring else ""
    (work / "sources.list").write_text(f"deb {signed_by}{debian_mirror()} {suite} main\n")
    settings: dict[str, str | Path] = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",  # apt's own user cannot write into the folder
    }
    if architecture:
        (work / "status").touch()
        settings["Dir::State::status"] = work / "status"
        settings |= {"APT::Architecture": architecture, "APT::Architectures::": architecture}
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def debian_mirror() -> str:
    for line in _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL) $(SUITE)"]).splitlines():
        uri, _, rest = line.partition(" ")
        label, _, suite = rest.rpartition(" ")
        if label == "Debian" and "-" not in suite:
            return uri
    raise LookupError("no Debian mirror is configured for apt, or `apt-get update` has not run yet")


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
