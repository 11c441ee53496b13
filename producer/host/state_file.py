"""Small files of the state folder. Their paths may hold anything: nothing, a folder, a pipe, a link, 10 GB.

Standard library only.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

ASIDE = ".damaged"
_MOST_ASIDE = 4


class NotAFileError(OSError):
    """The path is not a regular file, or the file is too large."""


def check_ordinary(path: Path) -> None:
    """Raise NotAFileError for a path that a library must not open: a pipe could block it, and a device has no end.

    Files, folders and links to them pass, and so do missing ones, which the library reports.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise NotAFileError(errno.EINVAL, "expected a regular file", str(path))


def open_regular(path: Path) -> int:
    """Open a regular file for reading, but no link, and no pipe, which would block. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise NotAFileError(errno.EINVAL, "not a regular file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read(path: Path, most_bytes: int) -> bytes:
    """Return a file's content. Raises OSError, also if it has more than `most_bytes`."""
    with open(open_regular(path), "rb") as file:
        content = at_most(file, most_bytes + 1)
    if len(content) > most_bytes:
        raise NotAFileError(errno.EFBIG, f"more than {most_bytes} bytes", str(path))
    return content


def at_most(file: BinaryIO, most_bytes: int) -> bytes:
    """Return the first bytes of a file that was opened with O_NONBLOCK. Raises OSError.

    Some of the kernel's files say that they are regular, but have nothing to read for now, such as /proc/kmsg.
    """
    content: bytes | None = file.read(most_bytes)
    if content is None:
        raise NotAFileError(errno.EINVAL, "expected a regular file")
    return content


def create(path: Path) -> int:
    """Create a file for appending, mode 0600, and replace an older file, pipe or link. Raises OSError.

    A folder is set aside.
    """
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        set_aside(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def write(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Replace a file atomically, mode 0600; with `sync`, also on disk. Raises OSError. A folder is set aside.

    Only one process may do so at a time: `path` with the suffix .new is written first.
    """
    fresh = path.with_suffix(".new")
    with open(create(fresh), "wb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    try:
        fresh.replace(path)
    except IsADirectoryError:
        if set_aside(path) is None:
            raise
        fresh.replace(path)
    if sync:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def set_aside(path: Path) -> Path | None:
    """Rename whatever is at `path` for inspection, and return its new path; None if that fails.

    The new name ends with .damaged and replaces an older file of that name, so that they do not accumulate.
    """
    for number in range(_MOST_ASIDE):
        aside = path.with_name(path.name + ASIDE + (f".{number}" if number else ""))
        with contextlib.suppress(OSError):
            path.rename(aside)
            return aside
    return None


def is_count(value: object, below: int = 1 << 63) -> bool:
    """Whether a JSON value is an integer from 0 to below a limit, and not a boolean."""
    return type(value) is int and 0 <= value < below
