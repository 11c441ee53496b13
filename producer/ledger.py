"""A stream's account on disk: what a producer that takes a ring or a spool over must know, in one page of a file.

The page is allocated once and written in place, so that a write needs no room on a full disk, and a process that is
killed leaves the old text or the new one. A page that cannot be read (another version's, or after a power cut) counts
as none.
"""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Account:
    """What is settled of a ring and of the spool behind it, at one moment."""

    ring: str = ""
    """Identity of the ring that `position`, `carried` and `lost` belong to."""
    position: int = 0
    """Ring position before which all is delivered, lost, or on disk."""
    carried: int = 0
    """Events that the spool held when the ring was made."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Events lost since then by reason, but for those that the kernel counts."""
    acked: int = 0
    """Number of the spool's first event that is not done."""
    end: int = 0
    """Number behind the spool's last event."""
    gone: int = 0
    """Events from `acked` on that are counted as lost already."""


class Ledger:
    """The page at `path`; `open` makes the file (mode 0600). OSError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def open(self) -> None:
        """Make the file where there is none, and allocate its page."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._descriptor, 0, _PAGE_BYTES)

    def read(self) -> Account | None:
        """Return what was written last; None where there is nothing that can be read."""
        try:
            data = self._path.read_bytes()
            crc, _, text = data.rstrip(b" \0").partition(b" ")
            if int(crc, 16) == zlib.crc32(text):
                return Account(**json.loads(text))
        except (OSError, ValueError, TypeError):
            pass
        return None

    def write(self, account: Account) -> None:
        """Put `account` in the place of what is there."""
        text = json.dumps(dataclasses.asdict(account)).encode()
        page = b"%08x %s" % (zlib.crc32(text), text)
        if len(page) > _PAGE_BYTES or self._descriptor < 0:
            raise OSError(f"{self._path}: no page for {len(page)} bytes")
        os.pwrite(self._descriptor, page.ljust(_PAGE_BYTES), 0)

    def close(self) -> None:
        """Put the page on the disk itself, and close the file."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
