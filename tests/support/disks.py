"""File systems that only root can mount: one of 1 MiB, and a bpffs. And a limit on the size of files."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "rebpf-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def bpffs(folder: Path) -> Iterator[Path]:
    """Mount a bpffs at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, option: str) -> None:
    """Make the file system read-only (ro), or writable again (rw)."""
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave not a byte of room; return the file that takes it all."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    assert os.statvfs(folder).f_bavail == 0
    return path


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Let this process write no larger files, even as root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
