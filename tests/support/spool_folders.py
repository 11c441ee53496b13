"""Spools on disk as a producer leaves them, with synthetic events numbered from 1 on one CPU."""

import ipaddress
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from producer.config.load import Config
from producer.encode.batch import BatchEncoder
from producer.events import TRANSMITS, Batch, EncodedBatch, Stream, common
from producer.host.cgroups import CgroupPaths
from producer.host.clock import now
from producer.pipeline.ledger import Account, Ledger
from producer.schemas import load_schema
from producer.spool.from_config import ledger_path, quarantine_folder, spool_folder
from producer.spool.spool import Spool

FLOWS = 31
RING = "ring"
STRIDE = 208
_START_NS = 1_790_000_000_000_000_000


def encoded(stream: Stream, first: int, count: int) -> EncodedBatch:
    """Return the events `first` to `first` + `count` - 1, spread over FLOWS flows, in the order of time."""
    numbers = np.arange(first, first + count)
    rows = np.zeros(count, stream.dtype)
    segment = common(rows)
    segment["flow"]["saddr"] = segment["flow"]["daddr"] = np.frombuffer(
        ipaddress.IPv6Address("::ffff:10.0.0.1").packed, np.uint8
    )
    segment["flow"]["sport"], segment["flow"]["dport"] = 40_000 + numbers % FLOWS, 443
    segment["cpu_seq"], segment["ts"] = numbers, numbers * 1000
    host = {"host": "host-1", "boot_id": "5e4a1cde-0000-4000-8000-123456789abc"}
    encoder = BatchEncoder(stream, load_schema(stream.schema_file), stream.fixed_schema_id, host, CgroupPaths(None))
    return encoder.encode(Batch(stream, rows), _START_NS)


def fill(
    state_dir: Path,
    *,
    batches: int,
    size: int,
    per_file: int = 1 << 30,
    acked: int = 0,
    noted: int | None = None,
    stream: Stream = TRANSMITS,
) -> list[Path]:
    """Spool batches of `size` events, `per_file` in each file, and write the ledger; return the files.

    Events before `acked` are done and their files deleted. The ledger has `noted` events, or all.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = Config(state_dir=state_dir)
    folder = spool_folder(config, stream)
    for first in range(0, batches, per_file):
        spool = Spool(folder, stream, load_schema(stream.schema_file), now, max_bytes=1 << 30)
        spool.open()
        for number in range(first, min(first + per_file, batches)):
            batch = encoded(stream, number * size + 1, size)
            spool.append(batch, RING, (number + 1) * size * STRIDE)
        spool.close()
    end = batches * size if noted is None else noted
    write_ledger(state_dir, Account(RING, end * STRIDE, 0, {}, acked, end), stream)
    spool = Spool(folder, stream, load_schema(stream.schema_file), now, max_bytes=1 << 30)
    spool.open(acked, end)
    spool.close()
    return sorted(folder.glob("*.avro"))


def quarantine(state_dir: Path, reasons: Mapping[str, int], stream: Stream = TRANSMITS) -> list[Path]:
    """Put messages into the quarantine, with a count per reason; return its files."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = quarantine_folder(Config(state_dir=state_dir), stream)
    spool = Spool(folder, stream, load_schema(stream.schema_file), now, max_bytes=1 << 26)
    spool.open()
    for reason, count in reasons.items():
        spool.append(encoded(stream, spool.end + 1, count), "", 0, reason)
    spool.close()
    return sorted(folder.glob("*.avro"))


def read_ledger(state_dir: Path, stream: Stream = TRANSMITS) -> Account | None:
    return Ledger(ledger_path(Config(state_dir=state_dir), stream)).read()


def write_ledger(state_dir: Path, account: Account, stream: Stream = TRANSMITS) -> None:
    ledger = Ledger(ledger_path(Config(state_dir=state_dir), stream))
    ledger.open()
    ledger.write(account)
    ledger.close()


def blocks(path: Path) -> list[tuple[int, int]]:
    """Return where a file's blocks begin and end, by its sync marker: the file's last 16 bytes."""
    data = path.read_bytes()
    sync, ends, at = data[-16:], [], 0
    while (at := data.find(sync, at)) >= 0:
        at += len(sync)
        ends.append(at)
    return list(pairwise(ends))


def flip(path: Path, at: int) -> None:
    """Change a byte of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return all files below a folder, each with its time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }
