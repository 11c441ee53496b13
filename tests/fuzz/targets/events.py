"""Ring memory, names, and framed messages."""

import contextlib
import io
import ipaddress
import itertools
import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import fastavro
import numpy as np
from hypothesis import strategies as st

from producer.backoff import BackOff
from producer.commands.tail import Event, json_line
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.event_id import read_events
from producer.encode.batch import BatchEncoder
from producer.encode.isolate import Isolator
from producer.events import HEARTBEATS, STREAMS, Batch, EncodedBatch, Outcome, Stream
from producer.health.heartbeat import HeartbeatEncoder
from producer.host import text
from producer.kernel.ringbuf import Ring
from producer.pipeline.ledger import Account
from producer.pipeline.pipeline import Pipeline
from producer.pipeline.recovery import resume
from producer.pipeline.stream import Stores, StreamPipeline
from producer.schemas import load_schema
from producer.view.line import Lines
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import HOSTILE, mutated, texts
from tests.support import spool_folders
from tests.support.batches import decoded
from tests.support.names import raw_name
from tests.support.statuses import status

_RING_BYTES = 1 << 14


class _Memory:
    """A ring's memory, as a file with the kernel's layout: the data twice in a row."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ring")
        self._bytes = 2 * mmap.PAGESIZE + 2 * _RING_BYTES
        os.truncate(self.descriptor, self._bytes)

    def fill(self, data: bytes, consumer: int, producer: int) -> None:
        """Fill the ring with repeated data, and set the positions."""
        data = (data or b"\0") * (_RING_BYTES // max(1, len(data)) + 1)
        os.pwrite(self.descriptor, struct.pack("<Q", consumer), 0)
        os.pwrite(self.descriptor, struct.pack("<Q", producer), mmap.PAGESIZE)
        os.pwrite(self.descriptor, data[:_RING_BYTES] * 2, 2 * mmap.PAGESIZE)


class _Sink:
    """Accepts all batches, and reports them as delivered at the next poll."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._open: list[EncodedBatch] = []

    def capacity(self, stream: Stream) -> int:
        return 4096

    def unacknowledged(self, batch: EncodedBatch) -> int:
        return len(batch) if batch in self._open else 0

    def send(self, batch: EncodedBatch) -> None:
        body = batch.payload[int(batch.starts[0]) :][: int(batch.lengths[0])].tobytes()[5:]
        buffer = io.BytesIO(body)
        fastavro.schemaless_reader(buffer, self._schema, None)
        if buffer.tell() != len(body):
            raise FindingError("bytes are left over")
        self._open.append(batch)

    def poll(self) -> dict[str, Outcome]:
        told: dict[str, Outcome] = {}
        for batch in self._open:
            outcome = told.setdefault(batch.stream.name, Outcome())
            outcome.delivered += len(batch)
            outcome.done.append((batch, Counter()))
        self._open = []
        return told


@contextlib.contextmanager
def _rings() -> Iterator[Check]:
    """A ring that is taken over is emptied and each record counted, whatever ring and ledger contain."""
    memory = _Memory()
    encoders = {stream.name: _encoder(stream, "host-1", "/a") for stream in STREAMS}
    schemas = {stream.name: fastavro.parse_schema(load_schema(stream.schema_file)) for stream in STREAMS}

    def check(example: tuple[Stream, bytes, int, int, int]) -> None:
        stream, data, consumer, producer, noted = example
        memory.fill(data, consumer, producer)
        seconds = itertools.count(0, 61)
        refused: list[str] = []
        with Ring(memory.descriptor, _RING_BYTES, stream.dtype, lambda: next(seconds)) as ring:
            account = resume(Account("ring", position=noted), "ring", ring, None)
            encoder = Isolator(encoders[stream.name], lambda rows, error: refused.append(error))
            stores = Stores(None, lambda account: None, BackOff("spool"), 2.0)
            path, sink = StreamPipeline(stream, ring, encoder, stores, account), _Sink(schemas[stream.name])
            pipeline = Pipeline([path], sink, lambda: 0.0, lambda: 0)
            steps = 0
            while ring.unread or pipeline.step():
                pipeline.step()
                steps += 1
                if steps > 3 * _RING_BYTES // ring.stride:
                    raise FindingError(f"the ring is not emptied: {ring.unread} records are left")
            pipeline.step()
            if ring.fill * _RING_BYTES >= ring.stride:
                raise FindingError("room is not given back")
            if path.taken < path.account.delivered + path.account.lost.total():
                raise FindingError("more is counted than there was")

    try:
        yield check
    finally:
        os.close(memory.descriptor)


@contextlib.contextmanager
def _names() -> Iterator[Check]:
    """Any bytes make a printable, bounded name, reversible unless truncated; events and heartbeats carry it."""
    stream = STREAMS[0]
    schema = fastavro.parse_schema(load_schema(stream.schema_file))
    beat = fastavro.parse_schema(load_schema(HEARTBEATS.schema_file))

    def check(raw: bytes) -> None:
        name = text.name(raw)
        if not name.isprintable() or len(name) > text.MAX_NAME or raw_name(name) not in (None, raw):
            raise FindingError(f"name {name!r}")
        if len(text.printable(name + "\n").splitlines()) != 1:
            raise FindingError("more than a line")
        encoded = _encoder(stream, name, name).encode(Batch(stream, _rows(stream)), 0)
        body = encoded.payload[: int(encoded.lengths[0])].tobytes()[5:]
        record: Any = fastavro.schemaless_reader(io.BytesIO(body), schema, None)
        if record["host"] != name:
            raise FindingError(f"host {record['host']!r}")
        _, value = HeartbeatEncoder(stream.fixed_schema_id).encode(status(host=name, reasons=(name,)), 0.0)
        fastavro.schemaless_reader(io.BytesIO(value[5:]), beat, None)

    yield check


@contextlib.contextmanager
def _raw_names() -> Iterator[Check]:
    """A cgroup's path from the operating system, with surrogates, reaches an event."""
    stream = STREAMS[0]

    def check(path: str) -> None:
        name = text.name(path.encode(errors="surrogatepass"))
        _encoder(stream, "host-1", name).encode(Batch(stream, _rows(stream)), 0)

    yield check


@contextlib.contextmanager
def _messages() -> Iterator[Check]:
    """A message is an event that fastavro reads too and that can be printed, or it is undecodable."""
    decoder = Decoder(None)
    views = [Lines(200, hosts=True, color=False), Lines(80, hosts=False, color=True)]

    def check(value: bytes | None) -> None:
        events, rejected = read_events(decoder, [value, value])
        if len(events) + len(rejected) != 2:
            raise FindingError("a message is neither an event nor rejected")
        with contextlib.suppress(UndecodableError):
            record = decoded(decoder, value)
            if record != _by_fastavro(decoder, value or b""):
                raise FindingError("fastavro reads another record")
            for view in views:
                lines = view.lines([record])
                # A new day has a line.
                if any(len(line.splitlines()) != 1 + line.startswith("-- ") or len(line) > 8192 for line in lines):
                    raise FindingError(f"more than a line: {lines!r}")
            json.loads(json_line(Event("topic", "key", record)))

    yield check


def _by_fastavro(decoder: Decoder, value: bytes) -> Any:
    schema = decoder.schema(int.from_bytes(value[1:5]))
    return fastavro.schemaless_reader(io.BytesIO(value[5:]), schema, None)


class _OneCgroup:
    """Cgroups with the same path."""

    found = 0

    def __init__(self, path: str) -> None:
        self._path = path

    def path(self, cgroup_id: int) -> str:
        return self._path

    def look_up(self, ids: Iterable[int] = ()) -> None: ...


def _encoder(stream: Stream, host: str, cgroup: str) -> BatchEncoder:
    fields = {"host": host, "boot_id": "5e4a1cde-0000-4000-8000-123456789abc"}
    return BatchEncoder(stream, load_schema(stream.schema_file), stream.fixed_schema_id, fields, _OneCgroup(cgroup))


def _rows(stream: Stream) -> Any:
    rows = np.zeros(1, stream.dtype)
    flow = rows["s"]["flow"]
    flow["saddr"] = flow["daddr"] = np.frombuffer(ipaddress.IPv6Address("::1").packed, np.uint8)
    flow["cgroup_id"], flow["flow_known"] = 7, 255
    rows["s"]["known"] = 0xFFFFFFFF
    return rows


def _record(stream: Stream, fill: bytes) -> bytes:
    body = (fill * stream.dtype.itemsize)[: stream.dtype.itemsize]
    return struct.pack("<II", stream.dtype.itemsize, 0) + body


def _values() -> tuple[bytes, ...]:
    found = []
    for stream in STREAMS:
        encoded = spool_folders.encoded(stream, 1, 2)
        found.append(encoded.payload[: int(encoded.lengths[0])].tobytes())
    return tuple(found)


_streams = st.sampled_from(STREAMS)
_fills = st.one_of(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"]), st.binary(min_size=1, max_size=64))
_whole = st.tuples(_streams, _fills).map(lambda pair: (pair[0], _record(*pair)))
_garbage = st.tuples(_streams, st.binary(max_size=600))
_strides = [8 + stream.dtype.itemsize for stream in STREAMS]
_ring = st.tuples(
    st.one_of(_whole, _garbage),
    st.sampled_from([0, 8, _strides[0] * 3, _strides[1] * 7, _RING_BYTES, 1 << 40]),
    st.one_of(
        st.sampled_from([0, *_strides, 3 * _strides[0], _RING_BYTES]),
        st.integers(0, _RING_BYTES // 8).map(lambda n: n * 8),
    ),
).map(lambda parts: (*parts[0], parts[1], parts[1] + parts[2]))
_positions = st.one_of(st.integers(0, 1 << 17), st.sampled_from([1 << 40, (1 << 63) + 8, (1 << 64) - 1]))
_ring = st.one_of(
    st.tuples(_ring, st.one_of(st.just(0), _positions)).map(lambda pair: (*pair[0], pair[1])),
    st.tuples(st.one_of(_whole, _garbage), _positions, _positions, _positions).map(
        lambda parts: (*parts[0], *parts[1:])
    ),
)
_raw = st.one_of(st.binary(max_size=300), texts.map(lambda each: each.encode(errors="surrogateescape")))
_paths = st.one_of(st.sampled_from(HOSTILE), st.binary(max_size=60).map(os.fsdecode))

TARGETS = (
    Target("ring", _ring, _rings, 150),
    Target("names", _raw, _names, 60),
    Target("cgroup_paths", _paths, _raw_names, 40),
    Target("messages", st.one_of(mutated(_values()), st.none()), _messages, 300),
)
