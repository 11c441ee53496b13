"""Files that a command writes where its user says."""

import os
import tempfile
from pathlib import Path


def check_folder(path: Path) -> None:
    """Raise OSError if no file can be created in a file's folder, before the work for its content is done."""
    if not path.exists():
        tempfile.TemporaryFile(dir=path.parent).close()


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file, which appears complete or not at all. Raises OSError.

    What a device, a pipe or a link such as /dev/stdout leads to is written to, since it must not be replaced.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        # In a folder such as /tmp, another user may have put a link there.
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(content)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
