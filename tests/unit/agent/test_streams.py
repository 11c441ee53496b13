"""Rings of replaced hooks: all of their events that are not yet safe go into the spool."""

import io
import os
import resource
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import fastavro
import numpy as np
import pytest

from producer.agent.streams import StreamBuilder, StreamParts, has_undelivered
from producer.config.load import Config, Kafka
from producer.errors import UnavailableError
from producer.events import FLOWS, TRANSMITS, EncodedBatch, Rows, SchemaId, Stream
from producer.pipeline.ledger import Account, Ledger
from producer.schemas import load_schema
from producer.spool.from_config import ledger_path, new_spool
from producer.spool.quarantine import Quarantine

FRAME_BYTES = 5
STRIDE = TRANSMITS.dtype.itemsize + 8


class Ring:
    """Holds rows with increasing cpu_seq, from `first` on."""

    stride = STRIDE
    damaged = 0
    fill = 0.0
    size_bytes = 1 << 20

    def __init__(self, first: int = 0, count: int = 0) -> None:
        self._rows = np.zeros(count, TRANSMITS.dtype)
        self._rows["s"]["cpu_seq"] = np.arange(first, first + count)
        self._rows["s"]["flow"]["saddr"][:, 10:12] = self._rows["s"]["flow"]["daddr"][:, 10:12] = 255
        self.position = self.committed = 0
        self.end = count
        """Rows that can be read."""

    @property
    def records_before(self) -> int:
        return self.position // STRIDE

    @property
    def unread(self) -> int:
        return len(self._rows) - self.records_before

    def read(self, limit: int) -> Rows:
        rows = self._rows[self.records_before : self.end][:limit]
        self.position += STRIDE * len(rows)
        return rows

    def holds(self, position: int) -> bool:
        return self.committed <= position <= len(self._rows) * STRIDE

    def commit(self, position: int) -> None:
        self.committed = position

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Hooks:
    """New hooks, and the rings of those that they replaced."""

    ring_id, old_ring_id = "new", "old"

    def __init__(self, *old: Ring) -> None:
        self._old = old

    @property
    def old_streams(self) -> set[Stream]:
        return {stream for stream, _ in self.old_rings()}

    def old_rings(self) -> list[tuple[Stream, Any]]:
        return [(TRANSMITS, ring) for ring in self._old]

    def ring(self, stream: Stream) -> Any:
        return Ring()


def settings(tmp_path: Path, **spool: Any) -> Config:
    config = Config(state_dir=tmp_path, kafka=Kafka(brokers="127.0.0.1:1"))
    return replace(config, spool=replace(config.spool, **spool))


def build(config: Config, *old: Ring) -> StreamParts:
    hooks: Any = Hooks(*old)
    with ExitStack() as stack:
        return StreamBuilder(config, hooks, {"transmit": SchemaId(1)}, stack, Quarantine(config)).build(TRANSMITS)


def spooled(config: Config) -> int:
    """Return the number of events on disk."""
    spool = new_spool(config, TRANSMITS)
    spool.open()
    count = sum(len(each.batch) for each in iter(spool.read, None))
    spool.close()
    return count


def test_a_stream_that_is_off_is_needed_while_an_earlier_runs_events_are_on_disk_or_in_a_ring(tmp_path: Path) -> None:
    config, empty, old = settings(tmp_path), Hooks(), Hooks(Ring(0, 7))
    assert not has_undelivered(config, cast(Any, empty), TRANSMITS)
    assert has_undelivered(config, cast(Any, old), TRANSMITS)
    assert not has_undelivered(config, cast(Any, old), FLOWS)
    build(config, Ring(0, 7))
    assert has_undelivered(config, cast(Any, empty), TRANSMITS)
    assert not has_undelivered(settings(tmp_path, transmit_bytes=0), cast(Any, empty), TRANSMITS)


def note(config: Config, account: Account) -> None:
    ledger = Ledger(ledger_path(config, TRANSMITS))
    ledger.open()
    ledger.write(account)
    ledger.close()


def test_the_ledgers_position_in_the_last_old_ring_is_not_used_for_older_ones(tmp_path: Path) -> None:
    config = settings(tmp_path)
    note(config, Account("old", position=4 * STRIDE))
    older, last = Ring(0, 7), Ring(100, 11)
    parts = build(config, older, last)
    assert older.committed == 7 * STRIDE
    assert last.committed == 11 * STRIDE
    assert spooled(config) == 7 + 11 - 4
    assert parts.pipeline.account.carried == 7 + 11 - 4
    assert not parts.pipeline.account.lost


def test_a_crash_between_spool_and_ring_moves_nothing_twice(tmp_path: Path) -> None:
    config = settings(tmp_path)
    note(config, Account("old"))
    build(config, Ring(0, 7), Ring(100, 11))
    again = Ring(100, 11)  # its position was not committed
    assert build(config, again).pipeline.account.carried == 7 + 11
    assert spooled(config) == 7 + 11


@pytest.mark.parametrize("old", [1, 2])
def test_without_a_spool_what_old_rings_hold_is_counted_as_lost(
    tmp_path: Path, old: int, caplog: pytest.LogCaptureFixture
) -> None:
    parts = build(settings(tmp_path, transmit_bytes=0), *(Ring(0, 7) for _ in range(old)), Ring(0, 0))
    assert caplog.text.count("events of replaced hooks lost") == old
    assert parts.pipeline.account.lost == {"old_ring": 7 * old}
    assert parts.pipeline.account.carried == 7 * old


@pytest.mark.parametrize("position", [12 * STRIDE, 1 << 63])
def test_a_ledger_that_names_a_position_beyond_an_old_ring_costs_none_of_its_events(
    tmp_path: Path, position: int
) -> None:
    config = settings(tmp_path)
    note(config, Account("old", position=position))
    assert build(config, Ring(0, 11)).pipeline.account.carried == 11
    assert spooled(config) == 11


class DamagedRing(Ring):
    """Returns one row per read; the first, the third and the last are damaged."""

    def read(self, limit: int) -> Rows:
        rows = super().read(1)
        self.damaged = int(len(rows) > 0 and rows["s"]["cpu_seq"][0] in (0, 2, 6))
        return rows[self.damaged :]


def test_damaged_records_of_an_old_ring_are_counted_and_the_others_are_moved(tmp_path: Path) -> None:
    config = settings(tmp_path)
    parts = build(config, DamagedRing(0, 7))
    assert parts.pipeline.account.lost == {"old_ring": 3}
    assert spooled(config) == 4


class BrokenRing(Ring):
    def read(self, limit: int) -> Rows:
        raise RuntimeError("a defect")


def test_an_old_ring_that_cannot_be_read_costs_its_events_and_stops_no_start(tmp_path: Path) -> None:
    config = settings(tmp_path)
    parts = build(config, BrokenRing(0, 7), Ring(100, 11))
    assert parts.pipeline.account.lost == {"old_ring": 7}
    assert spooled(config) == 11


def test_a_start_without_descriptors_for_the_spool_ends_and_costs_no_event(tmp_path: Path) -> None:
    config = settings(tmp_path)
    build(config, Ring(0, 30))
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, usual[1]))  # one, for the ledger
    try:
        with pytest.raises(UnavailableError, match="Too many open files"):
            build(config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert spooled(config) == 30
    assert not build(config).pipeline.account.lost


def test_a_full_quarantine_is_logged_once_in_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(settings(tmp_path, quarantine_bytes=1))
    for _ in range(100):
        quarantine.put(EncodedBatch.of(TRANSMITS, b"key", b"value"), "MSG_SIZE_TOO_LARGE")
    quarantine.close()
    assert [record.message for record in caplog.records] == [
        "quarantine: cannot store 1 messages: the spool is full: 1 bytes"
    ]


class TakesAll:
    """A sink that keeps the messages."""

    def __init__(self) -> None:
        self.values: list[bytes] = []

    def capacity(self, stream: Stream) -> int:
        return 1000

    def send(self, batch: EncodedBatch) -> None:
        self.values.append(batch.packed())


def labels_of(value: bytes) -> Any:
    schema = fastavro.parse_schema(load_schema(TRANSMITS.schema_file))
    record: Any = fastavro.schemaless_reader(io.BytesIO(value[FRAME_BYTES:]), schema, None)
    return record["labels"]


def test_events_have_the_labels_of_the_last_reload(tmp_path: Path) -> None:
    config = replace(settings(tmp_path), labels={"env": "test"})
    ring, sink, hooks = Ring(0, 2), TakesAll(), Hooks()
    hooks.ring = lambda stream: ring  # type: ignore[method-assign]
    with ExitStack() as stack:
        builder = StreamBuilder(config, hooks, {"transmit": SchemaId(1)}, stack, Quarantine(config))  # type: ignore[arg-type]
        pipeline = builder.build(TRANSMITS).pipeline
        for _ in range(2):
            ring.end = ring.records_before + 1
            pipeline.step(sink, 0.0, 10**18)  # type: ignore[arg-type]
            builder.relabel({"env": "prod", "dc": "fra"})
    assert [labels_of(value) for value in sink.values] == [{"env": "test"}, {"env": "prod", "dc": "fra"}]


def test_a_pipe_in_place_of_the_raw_quarantine_blocks_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quarantine" / "transmit.raw.jsonl"
    path.parent.mkdir()
    os.mkfifo(path)
    Quarantine(settings(tmp_path)).put_raw(TRANSMITS, np.zeros(1, TRANSMITS.dtype), "a defect")
    assert "quarantine: cannot store 1 records: No such device or address" in caplog.text
