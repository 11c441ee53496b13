"""Files that a command writes where its user says."""

import os
import tempfile
from pathlib import Path
from typing import BinaryIO


def check_folder(path: Path) -> None:
    """Raise OSError if no file can be created in a file's folder, before the work for its content is done."""
    if not path.exists():
        tempfile.TemporaryFile(dir=path.parent).close()


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file, which appears complete or not at all. Raises OSError.

    A device, a pipe or a link, such as /dev/stdout, is not replaced: the content is written to it.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    partial = partial_of(path)
    try:
        with create(partial) as file:
            file.write(content)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Return where a file is written until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def create(partial: Path) -> BinaryIO:
    """Create a file, never through a link: in a folder such as /tmp, another user may have put one there."""
    partial.unlink(missing_ok=True)
    return open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")
