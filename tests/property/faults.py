"""Injects faults: calls that fail, partial writes, and a crash at a chosen step."""

import contextlib
import errno
import os
import random
from pathlib import Path as Folder

from producer.pipeline.ledger import Account, Ledger
from producer.spool.disk import Disk


class CrashError(BaseException):
    """The process ends here."""


class Faults:
    """The faults: the errno of all calls that write, and the number of calls until the process crashes."""

    def __init__(self) -> None:
        self.errno = 0
        self.calls = 0

    def crash(self) -> None:
        """Mark a step that cannot fail, but may crash."""
        if self.calls:
            self.calls -= 1
            if not self.calls:
                raise CrashError

    def fail(self) -> None:
        """Mark a step that can fail or crash."""
        self.crash()
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno))


class FailingDisk(Disk):
    """Makes partial writes, and fails on demand. Deleting needs no space."""

    def __init__(self, faults: Faults, chance: random.Random) -> None:
        self._faults, self._chance = faults, chance
        self._opened: set[tuple[int, int]] = set()

    def create(self, path: Folder) -> int:
        self._faults.fail()
        return self._note(super().create(path))

    def open(self, path: Folder) -> int:
        return self._note(super().open(path))

    def end(self) -> None:
        """Close what the process left open, as the kernel would."""
        for descriptor, inode in self._opened:
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    os.close(descriptor)

    def _note(self, descriptor: int) -> int:
        self._opened.add((descriptor, os.fstat(descriptor).st_ino))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        whole = self._chance.random() < 0.7
        part = super().write(descriptor, data if whole else data[: self._chance.randint(1, len(data))])
        self._faults.fail()
        return part

    def truncate(self, descriptor: int, size: int) -> None:
        if self._faults.errno == errno.EIO:
            self._faults.fail()
        super().truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self._faults.fail()
        super().sync(descriptor)

    def unlink(self, path: Folder) -> None:
        if self._faults.errno == errno.EROFS:
            self._faults.fail()
        self._faults.crash()
        super().unlink(path)


class FailingLedger(Ledger):
    """Can crash before and after a write. A full disk does not matter, since the page is allocated."""

    def __init__(self, path: Folder, faults: Faults) -> None:
        super().__init__(path)
        self._faults = faults

    def write(self, account: Account) -> None:
        if self._faults.errno in (errno.EROFS, errno.EIO):
            self._faults.fail()
        self._faults.crash()
        super().write(account)
        self._faults.crash()
