"""A stream's account on disk, in one page of a file: what the next producer needs to take over a ring or a spool.

The page is allocated once and written in place, so a write needs no space on a full disk, and a killed process leaves
either the old text or the new one. An unreadable file (of another version, torn by a power cut, a folder) counts as no
account and is renamed when the ledger is opened.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer.host import state_file
from producer.host.text import parse_json
from producer.spool.disk import UNRELATED
from producer.spool.spool import Spool

logger = logging.getLogger(__name__)

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Account:
    """The state of a ring and its spool at one moment."""

    ring: str = ""
    """Id of the ring that `position`, `carried` and `lost` belong to."""
    position: int = 0
    """Ring position before which every event is delivered, lost, or on disk."""
    carried: int = 0
    """Events in the spool when the ring was created."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Events lost since then by reason, without those that the kernel counts."""
    acked: int = 0
    """Number of the spool's first event that is not done."""
    end: int = 0
    """Number after the spool's last event."""
    discarded: int = 0
    """Events from `acked` on that are already counted as lost."""

    def with_spool(self, spool: Spool | None) -> "Account":
        """Return the account with the spool's numbers; without a spool, they are 0."""
        numbers = (spool.acked, spool.end, spool.discarded) if spool else (0, 0, 0)
        return Account(self.ring, self.position, self.carried, self.lost, *numbers)


class Ledger:
    """The page at `path`. `open` creates the file (mode 0600). Raises OSError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def open(self) -> None:
        """Create the file if needed and allocate its page; rename an unreadable file first."""
        if self._is_damaged() and (aside := state_file.set_aside(self._path)):
            logger.warning("ledger: %s is unreadable, renamed to %s", self._path, aside.name)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise OSError(errno.EINVAL, "not a regular file", str(self._path))
        os.posix_fallocate(self._descriptor, 0, _PAGE_BYTES)

    def read(self) -> Account | None:
        """Return the last account written; None if there is none that can be read.

        OSError: descriptors, memory or permission are lacking; the account is as it was.
        """
        try:
            return _account(state_file.read(self._path, _PAGE_BYTES))
        except OSError as error:
            if error.errno in UNRELATED:
                raise
        except (ValueError, TypeError):
            pass
        return None

    def _is_damaged(self) -> bool:
        """Whether the path holds something other than an account or an unwritten page."""
        try:
            page = state_file.read(self._path, _PAGE_BYTES)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in UNRELATED:
                raise
            return True
        return bool(page.strip(b" \0")) and self.read() is None

    def write(self, account: Account) -> None:
        """Overwrite the page with `account`."""
        text = json.dumps(dataclasses.asdict(account)).encode()
        page = b"%08x %s" % (zlib.crc32(text), text)
        if len(page) > _PAGE_BYTES or self._descriptor < 0:
            raise OSError(f"{self._path}: no page for {len(page)} bytes")
        if (written := os.pwrite(self._descriptor, page.ljust(_PAGE_BYTES), 0)) < _PAGE_BYTES:
            raise OSError(f"{self._path}: only {written} of {_PAGE_BYTES} bytes were written")

    def close(self) -> None:
        """Sync the page to disk and close the file."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def _account(page: bytes) -> Account:
    """Parse a page. Raises ValueError or TypeError if this version did not write it."""
    crc, _, text = page.rstrip(b" \0").partition(b" ")
    if int(crc, 16) != zlib.crc32(text):
        raise ValueError("the checksum is wrong")
    account = Account(**parse_json(text))
    lost: Any = account.lost
    if not isinstance(account.ring, str) or not isinstance(lost, dict):
        raise ValueError("a field has another type")
    counts = (account.position, account.carried, account.acked, account.end, account.discarded, *lost.values())
    if not all(map(state_file.is_count, counts)):
        raise ValueError("a count is out of range")
    return account
