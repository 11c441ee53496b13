"""A pipeline for tests: ring, encoder and Kafka in memory, a real spool."""

import errno
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path as Folder
from typing import Any

import numpy as np

from producer.events import STREAMS, TRANSMITS, Batch, EncodedBatch, Outcome, Rows, Stream, common
from producer.host.clock import Moment
from producer.pipeline.ledger import Account
from producer.pipeline.pipeline import Pipeline
from producer.pipeline.stream import Stores, StreamPipeline
from producer.spool.disk import Disk
from producer.spool.spool import Spool
from tests.support.memory_ring import MemoryRing

RING_ROWS = 1000
UTC_OFFSET_NS = 10**18
AFTER_S = 2.0
WAIT_S = 3.0
SCHEMA: dict[str, Any] = {"type": "record", "name": "Event", "fields": [{"name": "id", "type": "long"}]}


class IdEncoder:
    """Encodes an event as its number."""

    most = 1 << 20
    """Most rows that `fit` accepts."""
    key = b"k"

    def fit(self, rows: Rows) -> int:
        return min(len(rows), self.most)

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        assert utc_offset_ns == UTC_OFFSET_NS
        numbers = common(batch.rows)["cpu_seq"].astype(">u8")
        count = len(numbers)
        ones = np.ones(count, np.int64)
        payload = np.frombuffer(numbers.tobytes(), np.uint8)
        keys = np.frombuffer(self.key, np.uint8), ones * 0, ones * len(self.key)
        return EncodedBatch(batch.stream, payload, np.arange(count) * 8, ones * 8, *keys)


def ids(batch: EncodedBatch) -> list[int]:
    return np.frombuffer(batch.packed(), ">u8").astype(int).tolist()


class MemorySink:
    """Holds batches in flight until `report` delivers or loses their messages."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.open: dict[str, list[list[Any]]] = {stream.name: [] for stream in STREAMS}
        """For each batch in flight: the batch, its messages in flight, and its losses."""
        self.sent: list[int] = []
        """Ids of the transmits sent, in order."""
        self._reports: dict[str, Outcome] = {}

    def capacity(self, stream: Stream) -> int:
        return max(0, self._most - sum(left for _, left, _ in self.open[stream.name]))

    def unacknowledged(self, batch: EncodedBatch) -> int:
        return sum(left for each, left, _ in self.open[batch.stream.name] if each is batch)

    def send(self, batch: EncodedBatch) -> None:
        self.open[batch.stream.name].append([batch, len(batch), Counter()])
        if batch.stream == TRANSMITS:
            self.sent += ids(batch)

    def report(self, stream: Stream, index: int, count: int, reason: str | None = None) -> None:
        """Report `count` messages of the batch `index` as delivered, or as lost with a reason."""
        flight = self.open[stream.name][index]
        reports = self._reports.setdefault(stream.name, Outcome())
        flight[1] -= count
        if reason is None:
            reports.delivered += count
        else:
            reports.lost[reason] += count
            flight[2][reason] += count
        if flight[1] == 0:
            reports.done.append((flight[0], flight[2]))
            del self.open[stream.name][index]

    def take_all(self) -> None:
        """Report all messages as delivered."""
        for stream in STREAMS:
            while self.open[stream.name]:
                self.report(stream, 0, self.open[stream.name][0][1])

    def poll(self) -> Mapping[str, Outcome]:
        reports, self._reports = self._reports, {}
        return reports


class FullDisk(Disk):
    """A disk that is `full` or `unreadable` on demand."""

    full = False
    unreadable = 0
    """The errno of opening a file; 0: it succeeds."""

    def open(self, path: Folder) -> int:
        if self.unreadable:
            raise OSError(self.unreadable, os.strerror(self.unreadable))
        return super().open(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, data)


class Waits:
    def __init__(self) -> None:
        self.resets = 0

    def next(self) -> float:
        return WAIT_S

    def reset(self) -> None:
        self.resets += 1


class Setup:
    def __init__(self, folder: Folder | None = None, *, most: int = 1 << 20) -> None:
        self.log: list[tuple[str, Any]] = []
        """Accounts that were written, and positions that were committed, in order."""
        self.counted: list[int] = []
        """Events that metrics counted."""
        self.now_s = 100.0
        self.sink = MemorySink(most)
        self.disk = FullDisk()
        self.waits = Waits()
        self.folder = folder
        self.ledger_errno = 0
        self.rings = {stream.name: MemoryRing(stream, RING_ROWS, self._note_commit) for stream in STREAMS}
        self.spools = {stream.name: self.spool(stream) for stream in STREAMS if folder}
        self.paths = {stream.name: self.path(stream) for stream in STREAMS}
        self.ages: list[tuple[float, int]] = []
        self.pipeline = Pipeline(
            list(self.paths.values()),
            self.sink,
            lambda: self.now_s,
            lambda: UTC_OFFSET_NS,
            lambda seconds, count: self.ages.append((seconds, count)),
        )

    def spool(self, stream: Stream) -> Spool:
        assert self.folder
        moment = lambda: Moment("boot", self.now_s, self.now_s)  # noqa: E731
        spool = Spool(self.folder / stream.name, stream, SCHEMA, moment, max_bytes=1 << 20, disk=self.disk)
        spool.open()
        return spool

    def path(self, stream: Stream) -> StreamPipeline:
        stores = Stores(self.spools.get(stream.name), self.write_account, self.waits, AFTER_S)
        return StreamPipeline(stream, self.rings[stream.name], IdEncoder(), stores, Account("ring"), self._count)

    def _count(self, rows: Rows) -> None:
        self.counted += rows["s"]["cpu_seq"].tolist()

    def _note_commit(self, position: int) -> None:
        self.log.append(("commit", position))

    def write_account(self, account: Account) -> None:
        if self.ledger_errno:
            raise OSError(self.ledger_errno, os.strerror(self.ledger_errno))
        self.log.append(("ledger", account))

    @property
    def ring(self) -> MemoryRing:
        return self.rings["transmit"]

    @property
    def transmits(self) -> StreamPipeline:
        return self.paths["transmit"]

    @property
    def files(self) -> list[str]:
        assert self.folder
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.avro"))

    def arrive(self, count: int) -> None:
        self.ring.written += count
        self.pipeline.step()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.pipeline.step()

    def assert_balanced(self) -> None:
        for name, path in self.paths.items():
            under_way = sum(left for _, left, _ in self.sink.open[name])
            assert (
                path.taken + path.account.carried
                == path.account.delivered + path.account.lost.total() + path.spooled + under_way
            )
