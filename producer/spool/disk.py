"""The system calls of a spool, in one place so that tests can inject disk errors."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from producer.host import state_file
from producer.host.clock import Moment

PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""Error numbers that are not about the file: a retry may succeed."""
UNRELATED = PASSING | {errno.EACCES, errno.EPERM}
"""Error numbers that say nothing about a file's content."""
ABOUT_THE_FILE = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG,
})  # fmt: skip
"""Error numbers after which a retry is useless: the file is missing, or not a spool's."""
_RETRY_S = 300.0
"""The disk may come back, or an operator changes the file's owner."""


class Disk:
    """The system calls that a spool needs. All may raise OSError."""

    def create(self, path: Path) -> int:
        """Create a file for appending, replacing the remains of a failed attempt, and a spool's folder that is gone."""
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        return state_file.create(path)

    def is_linked(self, descriptor: int) -> bool:
        """Whether the file still has a name: nobody has deleted it."""
        return os.fstat(descriptor).st_nlink > 0

    def open(self, path: Path) -> int:
        """Open a regular file for reading."""
        return state_file.open_regular(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append, and return how many bytes were written."""
        return os.write(descriptor, data)

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes."""
        return os.pread(descriptor, size, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        """Truncate a file."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Sync a file's data to disk."""
        os.fdatasync(descriptor)

    def rename(self, path: Path, new: Path) -> None:
        """Rename a file."""
        path.rename(new)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)


class Retries:
    """Limits how long reading a file is retried, one file at a time."""

    def __init__(self, now: Callable[[], Moment]) -> None:
        self._now = now
        self._failing: tuple[Path, Moment] | None = None
        """The file that cannot be read, and since when."""

    def allow(self, path: Path, error: OSError) -> bool:
        """Whether to try again after this error."""
        if error.errno in PASSING or error.errno in ABOUT_THE_FILE:
            return error.errno in PASSING
        now = self._now()
        if self._failing is None or self._failing[0] != path:
            self._failing = path, now
        return now.since(self._failing[1]) < _RETRY_S

    def reset(self) -> None:
        """Note that reading has succeeded."""
        self._failing = None
