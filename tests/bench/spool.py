"""The cost of writing events to disk and reading them back: the spool, SQLite and plain files.

python -m tests.bench.spool

Each way stores the same encoded batches (real schema, 4,096 events each) and reads all of them back. Besides CPU it
prints the bytes on disk, and how many batches are left after a page in the middle of the largest file was overwritten.
"""

import os
import sqlite3
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from producer.events import TRANSMITS, Batch, EncodedBatch
from producer.host.clock import now
from producer.schemas import load_schema
from producer.spool.spool import Spool
from tests.bench.stages import ROWS, UTC_OFFSET_NS, encoder, rows

BATCHES = 100


class SpoolFiles:
    """The producer's spool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spool = self._open()

    def _open(self) -> Spool:
        spool = Spool(self._folder / "spool", TRANSMITS, load_schema(TRANSMITS.schema_file), now, max_bytes=1 << 30)
        spool.open()
        return spool

    def put(self, batch: EncodedBatch) -> None:
        self._spool.append(batch, "ring", 0)

    def close(self) -> None:
        self._spool.close()

    def read(self) -> Iterator[int]:
        spool = self._open()
        while spooled := spool.read():
            yield len(spooled.batch)
            spool.ack(spooled.first, spooled.end)
        spool.sweep()


class Sqlite:
    """One row per batch in a database in WAL mode; compressed, or with a checksum."""

    def __init__(self, folder: Path, *, compressed: bool) -> None:
        self._path = folder / "spool.db"
        self._compressed = compressed
        self._database = self._open()
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("CREATE TABLE batches (first INTEGER PRIMARY KEY, data BLOB)")

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None)
        database.execute("PRAGMA synchronous = NORMAL")
        return database

    def put(self, batch: EncodedBatch) -> None:
        data = batch.packed()
        if self._compressed:
            data = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
        else:
            data = struct.pack("<I", zlib.crc32(data)) + data
        self._database.execute("INSERT INTO batches (data) VALUES (?)", (data,))

    def close(self) -> None:
        self._database.close()

    def read(self) -> Iterator[int]:
        database = self._open()
        for (first,) in database.execute("SELECT first FROM batches ORDER BY first").fetchall():
            data = database.execute("SELECT data FROM batches WHERE first = ?", (first,)).fetchone()[0]
            if self._compressed:
                zstandard.ZstdDecompressor().decompress(data)
            elif struct.unpack("<I", data[:4])[0] != zlib.crc32(data[4:]):
                raise ValueError("damaged")
            database.execute("DELETE FROM batches WHERE first = ?", (first,))
            yield ROWS
        database.close()


class Plain:
    """One file of batches with length and checksum; not compressed, never partly deleted."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "plain"
        self._file = self._path.open("wb", buffering=0)

    def put(self, batch: EncodedBatch) -> None:
        data = batch.packed()
        self._file.write(struct.pack("<II", len(data), zlib.crc32(data)) + data)

    def close(self) -> None:
        self._file.close()

    def read(self) -> Iterator[int]:
        with self._path.open("rb", buffering=0) as file:
            while head := file.read(8):
                size, crc = struct.unpack("<II", head)
                data = file.read(size)
                if zlib.crc32(data) != crc:
                    raise ValueError("damaged")
                yield ROWS


def us_per_event(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return (time.process_time() - before) / BATCHES / ROWS * 1e6


def append(store: SpoolFiles | Sqlite | Plain, batch: EncodedBatch) -> None:
    for _ in range(BATCHES):
        store.put(batch)
    store.close()


def left_after_damage(store: SpoolFiles | Sqlite | Plain, folder: Path) -> int:
    """Overwrite a page in the middle of the largest file, and return how many batches can be read."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2 & ~4095)
        file.write(os.urandom(4096))
    left = 0
    try:
        for count in store.read():
            left += count // ROWS
    except (sqlite3.Error, ValueError, zstandard.ZstdError, struct.error):
        pass
    return left


def main() -> None:
    """Measure and print."""
    batch = encoder().encode(Batch(TRANSMITS, rows()), UTC_OFFSET_NS)
    ways: dict[str, Callable[[Path], SpoolFiles | Sqlite | Plain]] = {
        "spool files": SpoolFiles,
        "SQLite, compressed": lambda folder: Sqlite(folder, compressed=True),
        "SQLite, checksums": lambda folder: Sqlite(folder, compressed=False),
        "plain file": Plain,
    }
    for name, make in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            store = make(Path(folder))
            put = us_per_event(lambda store=store: append(store, batch))  # type: ignore[misc]
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            read = us_per_event(lambda store=store: sum(store.read()))  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as folder:
            store = make(Path(folder))
            append(store, batch)
            left = left_after_damage(store, Path(folder))
        per_event = size / BATCHES / ROWS
        print(f"{name:20} put {put:.2f}, read {read:.2f} us an event; {per_event:.0f} bytes; {left} of {BATCHES} left")


if __name__ == "__main__":
    main()
