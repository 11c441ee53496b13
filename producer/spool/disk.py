"""The system calls on files that a spool is made of, in one place, so that tests can have a disk that fails."""

import errno
import os
from pathlib import Path

from producer.host import state_file

PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""Numbers of errors that say nothing of the file: another try may work."""


class Disk:
    """The system calls that a spool needs, all of which may raise OSError."""

    def create(self, path: Path) -> int:
        """Make a file for appending; what a failure left over in its place goes."""
        return state_file.create(path)

    def open(self, path: Path) -> int:
        """Open a regular file for reading."""
        return state_file.open_regular(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append, and return how much was taken."""
        return os.write(descriptor, data)

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes."""
        return os.pread(descriptor, size, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file off."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Put a file on the disk itself."""
        os.fdatasync(descriptor)

    def rename(self, path: Path, new: Path) -> None:
        """Give a file another name."""
        path.rename(new)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)
