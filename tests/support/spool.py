"""A spool for tests: events, a clock and a disk under the test's control, and the owner's part."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np

from producer.events import TRANSMITS, EncodedBatch
from producer.host.clock import Moment
from producer.spool.disk import Disk
from producer.spool.spool import Spool

IDENTITY = {"type": "fixed", "name": "Id", "size": 100}


SCHEMA: dict[str, Any] = {"type": "record", "name": "Event", "fields": [{"name": "id", "type": IDENTITY}]}


MESSAGE_BYTES = 5 + 100


ROWS = 10


BLOCK_BYTES = 1200


noise = np.random.default_rng(1)


def batch(first: int, count: int = ROWS) -> EncodedBatch:
    payload = noise.integers(0, 256, (count, MESSAGE_BYTES), np.uint8)
    payload[:, :8] = np.arange(first, first + count).astype(">u8").view(np.uint8).reshape(-1, 8)
    sizes, zeros = np.full(count, MESSAGE_BYTES), np.zeros(count, np.int64)
    keys = np.frombuffer(b"key", np.uint8)
    return EncodedBatch(
        TRANSMITS, payload.reshape(-1), np.arange(count) * MESSAGE_BYTES, sizes, keys, zeros, zeros + len(keys)
    )


def numbers(each: EncodedBatch) -> list[int]:
    return [int.from_bytes(each.payload[at : at + 8].tobytes(), "big") for at in each.starts.tolist()]


class Clock:
    def __init__(self) -> None:
        self.now = Moment("boot-1", 1000.0, 1.7e9)

    def pass_time(self, seconds: float) -> None:
        self.now = Moment(self.now.boot_id, self.now.boottime_s + seconds, self.now.time_s + seconds)

    def set(self, seconds: float) -> None:
        self.now = Moment(self.now.boot_id, self.now.boottime_s, self.now.time_s + seconds)

    def boot(self, boot_id: str, seconds: float) -> None:
        self.now = Moment(boot_id, 10.0, self.now.time_s + seconds)


class FailingDisk(Disk):
    """Raises the errno in `fails[call]`, writes at most `most_bytes` per call, and `room` bytes in total."""

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.most_bytes = 1 << 30
        self.room = 1 << 30
        self.calls: list[str] = []

    def _meet(self, call: str) -> None:
        self.calls.append(call)
        if number := self.fails.get(call):
            raise OSError(number, os.strerror(number))

    def create(self, path: Path) -> int:
        self._meet("create")
        return super().create(path)

    def open(self, path: Path) -> int:
        self._meet("open")
        return super().open(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._meet("write")
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(descriptor, data[: min(self.most_bytes, self.room)])
        self._meet("written")
        self.room -= taken
        return taken

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        self._meet("read")
        return super().read_at(descriptor, offset, size)

    def truncate(self, descriptor: int, size: int) -> None:
        self._meet("truncate")
        super().truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self._meet("sync")
        super().sync(descriptor)

    def rename(self, path: Path, new: Path) -> None:
        self._meet("rename")
        super().rename(path, new)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        super().unlink(path)


class Setup:
    """Opens spools as their owner does, on a disk and a clock that the test controls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.disk = FailingDisk()

    def open(self, ledger: tuple[int, int, int] | None = None, **options: Any) -> Spool:
        arguments = {"max_bytes": 1 << 20, "file_bytes": 3 * BLOCK_BYTES, "disk": self.disk, **options}
        spool = Spool(self.folder, TRANSMITS, SCHEMA, lambda: self.clock.now, **arguments)
        spool.open(*(ledger or ()))
        return spool

    def filled(self, batches: int, **options: Any) -> Spool:
        spool = self.open(**options)
        fill(spool, batches)
        return spool

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.exists() else []

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.files]


def fill(spool: Spool, batches: int) -> None:
    for _ in range(batches):
        spool.append(batch(spool.end), "ring", spool.end * 8)


def ledger_of(spool: Spool) -> tuple[int, int, int]:
    return spool.acked, spool.end, spool.discarded


def read_all(spool: Spool) -> list[int]:
    """Read all events, and check that each has its number."""
    found = []
    while spooled := spool.read():
        assert numbers(spooled.batch) == list(range(spooled.first, spooled.end))
        found += numbers(spooled.batch)
    return found


def finish(spool: Spool) -> list[int]:
    """Read and acknowledge all batches; return the numbers of all readable events."""
    found = []
    while spooled := spool.read():
        found += numbers(spooled.batch)
        spool.ack(spooled.first, spooled.end)
        spool.sweep()
    spool.ack(spool.end, spool.end)
    spool.sweep()
    return found


def size_on_disk(setup: Setup) -> int:
    return sum(path.stat().st_size for path in setup.files)
