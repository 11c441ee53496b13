"""The system calls of a spool, in one place so that tests can inject disk errors."""

import errno
import os
from pathlib import Path

from producer.host import state_file

PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""Error numbers that are not about the file: a retry may succeed."""


class Disk:
    """The system calls that a spool needs. All may raise OSError."""

    def create(self, path: Path) -> int:
        """Create a file for appending, replacing the remains of a failed attempt."""
        return state_file.create(path)

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
