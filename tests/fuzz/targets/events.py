"""Ring memory, names, and framed messages."""

import contextlib
import io
import ipaddress
import json
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import fastavro
import numpy as np
from hypothesis import strategies as st

from producer import text
from producer.decode import Decoder, UndecodableError
from producer.encode import BatchEncoder, load_schema
from producer.events import STREAMS, Batch, Stream
from producer.front import FrontReader
from producer.heartbeat import HeartbeatEncoder, heartbeat_schema
from producer.isolate import Unencodable
from producer.ring import Ring
from producer.view import View
from tests import spools
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import HOSTILE, mutated, texts
from tests.unit.statuses import status

_RING_BYTES = 1 << 14


class _Memory:
    """A ring's memory, as a file that is laid out as the kernel lays it out, the data twice in a row."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ring")
        self._bytes = 2 * mmap.PAGESIZE + 2 * _RING_BYTES
        os.truncate(self.descriptor, self._bytes)

    def fill(self, data: bytes, consumer: int, count: int) -> None:
        """Write data over and over, and positions with so many bytes between them."""
        data = (data or b"\0") * (_RING_BYTES // max(1, len(data)) + 1)
        os.pwrite(self.descriptor, struct.pack("<Q", consumer), 0)
        os.pwrite(self.descriptor, struct.pack("<Q", consumer + count), mmap.PAGESIZE)
        os.pwrite(self.descriptor, data[:_RING_BYTES] * 2, 2 * mmap.PAGESIZE)


@contextlib.contextmanager
def _rings() -> Iterator[Check]:
    """Garbage in a ring is a ValueError, or rows; garbage in rows makes messages that any Avro reader reads."""
    memory = _Memory()
    encoders = {stream.name: _encoder(stream, "host-1", "/a") for stream in STREAMS}
    schemas = {stream.name: fastavro.parse_schema(load_schema(stream)) for stream in STREAMS}

    def check(example: tuple[Stream, bytes, int, int]) -> None:
        stream, data, consumer, count = example
        memory.fill(data, consumer, count)
        with Ring(memory.descriptor, _RING_BYTES, stream.dtype) as ring:
            before = ring.position
            try:
                rows = ring.read(4096)
            except ValueError:
                if ring.position != before:
                    raise FindingError("the position moved in spite of an error") from None
                return
            if len(rows):
                try:
                    encoded = encoders[stream.name].encode(Batch(stream, rows), 0)
                except Unencodable:
                    return
                body = encoded.payload[int(encoded.starts[0]) :][: int(encoded.lengths[0])].tobytes()[5:]
                buffer = io.BytesIO(body)
                fastavro.schemaless_reader(buffer, schemas[stream.name], None)
                if buffer.tell() != len(body):
                    raise FindingError("bytes are left over")
            del rows
            ring.commit(ring.position)

    try:
        yield check
    finally:
        os.close(memory.descriptor)


@contextlib.contextmanager
def _names() -> Iterator[Check]:
    """Any bytes are a name that is printable, bounded, and turned back unless cut; events and heartbeats carry it."""
    (stream, _) = STREAMS
    schema = fastavro.parse_schema(load_schema(stream))
    beat = fastavro.parse_schema(heartbeat_schema())

    def check(raw: bytes) -> None:
        name = text.name(raw)
        if not name.isprintable() or len(name) > text.MAX_NAME or text.raw_name(name) not in (None, raw):
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
    """A cgroup's path as the operating system gives it, with surrogates, reaches an event."""
    (stream, _) = STREAMS

    def check(path: str) -> None:
        name = text.name(path.encode(errors="surrogatepass"))
        _encoder(stream, "host-1", name).encode(Batch(stream, _rows(stream)), 0)

    yield check


@contextlib.contextmanager
def _messages() -> Iterator[Check]:
    """A message is an event that can be shown, or it is undecodable."""
    decoder = Decoder(None)
    fronts, views = FrontReader(decoder), [View(color=False), View(color=True)]

    def check(value: bytes | None) -> None:
        with contextlib.suppress(UndecodableError):
            fronts.read(value)
        with contextlib.suppress(UndecodableError):
            record = decoder.decode(value)
            for view in views:
                line = view.line(record)
                if len(line.splitlines()) != 1:
                    raise FindingError(f"more than a line: {line!r}")
            text_of = json.dumps(record)
            json.loads(text_of)

    yield check


class _OneCgroup:
    """Cgroups that all have one path."""

    found = 0

    def __init__(self, path: str) -> None:
        self._path = path

    def path(self, cgroup_id: int) -> str:
        return self._path

    def look(self) -> None: ...


def _encoder(stream: Stream, host: str, cgroup: str) -> BatchEncoder:
    fields = {"host": host, "boot_id": "5e4a1cde-0000-4000-8000-123456789abc"}
    return BatchEncoder(stream, load_schema(stream), stream.fixed_schema_id, fields, _OneCgroup(cgroup))


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
        encoded = spools.encoded(stream, 1, 2)
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
).map(lambda parts: (*parts[0], parts[1], parts[2]))
_raw = st.one_of(st.binary(max_size=300), texts.map(lambda each: each.encode(errors="surrogateescape")))
_paths = st.one_of(st.sampled_from(HOSTILE), st.binary(max_size=60).map(os.fsdecode))

TARGETS = (
    Target("ring", _ring, _rings, 150),
    Target("names", _raw, _names, 60),
    Target("cgroup_paths", _paths, _raw_names, 40),
    Target("messages", st.one_of(mutated(_values()), st.none()), _messages, 300),
)
