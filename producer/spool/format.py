"""The format of a spool's files: Avro object containers, which any Avro tool can read.

A file has a header with the schema, then blocks with one record each, each followed by the file's random sync marker.
A record is a batch: its number in the spool, the ring it came from, and its messages as they go to Kafka, with the keys
separate. The codec is zstandard, each block a frame with a checksum: a block is read as it was written, or not at all.
Unreadable data is skipped up to the next sync marker.

Pure: bytes in, bytes out. Specification: https://avro.apache.org/docs/1.12.0/specification/#object-container-files.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fastavro
import numpy as np
import zstandard

from producer.events import EncodedBatch, Ints, Stream

FORMAT = "1"
_FRAME_BYTES = 5
_SYNC_BYTES = 16
_MOST_PREFIX_BYTES = 20
"""A block's data follows two varints."""
_MOST_BLOCK_BYTES = 1 << 26
_END_BYTES = 1 << 18
"""Most batches fit in this many bytes."""
_MOST_NUMBER = 1 << 63
"""Above any event's number: a signed long holds less."""
_LEVEL = 1  # 0.37 us per event and 3.8 times smaller; level 3 takes 1.5 times as long and saves a tenth more

_PREFIX_FIELDS: list[dict[str, Any]] = [
    {"name": "first", "type": "long", "doc": "Number of the batch's first event in this spool."},
    {"name": "ring", "type": "string", "doc": "The ring that the events came from."},
    {"name": "position", "type": "long", "doc": "Position in that ring after the batch's last event."},
    {"name": "reason", "type": "string", "doc": "Why Kafka rejected the messages; empty in the spool."},
    {"name": "lengths", "type": "bytes", "doc": "Length of each message: unsigned 32-bit integers, little-endian."},
    {"name": "key_numbers", "type": "bytes", "doc": "Index of each message's key, in the same encoding."},
    {"name": "key_lengths", "type": "bytes", "doc": "Length of each key, in the same encoding."},
    {"name": "keys", "type": "bytes", "doc": "The keys, concatenated."},
]
_PREFIX: Any = fastavro.parse_schema({"type": "record", "name": "rebpf.spool.Prefix", "fields": _PREFIX_FIELDS})
_U32 = np.dtype("<u4")


def container_schema(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a file's records for events of the schema `event`."""
    frame = {"type": "fixed", "name": "Frame", "size": _FRAME_BYTES}
    message = {
        "type": "record",
        "name": "Message",
        "doc": "A message's value: Confluent's frame, and the event.",
        "fields": [{"name": "frame", "type": frame}, {"name": "event", "type": event}],
    }
    messages = {"name": "messages", "type": {"type": "array", "items": message}}
    return {"type": "record", "name": "Batch", "namespace": "rebpf.spool", "fields": [*_PREFIX_FIELDS, messages]}


@dataclass(frozen=True, slots=True, eq=False)
class Spooled:
    """A batch in a spool: events number `first` to `end` - 1."""

    batch: EncodedBatch
    first: int
    ring: str
    position: int
    reason: str

    @property
    def end(self) -> int:
        """Number after the last event."""
        return self.first + len(self.batch)


class DamagedError(Exception):
    """The data read is not what was written."""


_NO_BATCH = (ValueError, LookupError, EOFError, TypeError, OverflowError, MemoryError)
"""What fastavro and numpy raise on invalid data."""


def header(schema: dict[str, Any], metadata: Mapping[str, str], sync: bytes) -> bytes:
    """Return a file's header; `sync` is its marker, 16 random bytes."""
    file = io.BytesIO()
    own = {"rebpf.format": FORMAT, **metadata}
    fastavro.writer(file, schema, [], codec="zstandard", metadata=own, sync_marker=sync)
    return file.getvalue()


def read_header(start: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Return the header's length, the sync marker and the metadata. Raises DamagedError if the file is not ours."""
    file = io.BytesIO(start)
    try:
        metadata = dict(fastavro.block_reader(file).metadata)
    except Exception as error:  # invalid data can raise anything in the parser
        raise DamagedError(f"no header: {error}") from error
    if metadata.get("rebpf.format") != FORMAT:
        raise DamagedError("of another version")
    return file.tell(), start[file.tell() - _SYNC_BYTES : file.tell()], metadata


def block(spooled: Spooled, sync: bytes) -> bytes:
    """Return a batch as a block of a file with this sync marker."""
    batch = spooled.batch
    numbers, keys, key_lengths = _compact_keys(batch)
    file = io.BytesIO()
    prefix = {
        "first": spooled.first,
        "ring": spooled.ring,
        "position": spooled.position,
        "reason": spooled.reason,
        "lengths": batch.lengths.astype(_U32).tobytes(),
        "key_numbers": numbers.astype(_U32).tobytes(),
        "key_lengths": key_lengths.astype(_U32).tobytes(),
        "keys": keys,
    }
    fastavro.schemaless_writer(file, _PREFIX, prefix)
    file.write(_varint(len(batch)))
    file.write(batch.packed())
    file.write(_varint(0))
    data = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(file.getbuffer())
    return _varint(1) + _varint(len(data)) + data + sync


class Reader:
    """Reads a file's batches in order; `read_at(offset, size)` returns up to `size` bytes of the file."""

    def __init__(self, stream: Stream, sync: bytes, start: int, read_at: Callable[[int, int], bytes]) -> None:
        self._stream = stream
        self._sync = sync
        self._read_at = read_at
        self._at = start
        self.damaged = False
        """Whether something had to be skipped."""

    def next(self) -> Spooled | None:
        """Return the next readable batch; None if there is none yet."""
        while True:
            try:
                found = self._block(self._at)
            except DamagedError:
                at = self._find_sync(self._at + 1)
                if at is None:
                    return None
                self.damaged = True
                self._at = at
                continue
            if found is None:
                return None
            spooled, self._at = found
            return spooled

    def last(self, size: int) -> Spooled | None:
        """Return the last readable batch of a file of `size` bytes; of what is not damaged, only the end is read."""
        for window in (_END_BYTES, _MOST_BLOCK_BYTES + _END_BYTES):
            start = max(self._at, size - window) - _SYNC_BYTES  # the header ends with a marker
            before = self._read_at(start, size - start).rfind(self._sync, 0, -_SYNC_BYTES)
            if before >= 0:
                break
        last = None
        try:
            last, end = self._block(start + before + _SYNC_BYTES) or (None, 0)
        except DamagedError:
            end = 0
        if end != size:
            while found := self.next():
                last = found
        return last

    def _block(self, at: int) -> tuple[Spooled, int] | None:
        start = self._read_at(at, _MOST_PREFIX_BYTES)
        if not start:
            return None
        count, used = _read_varint(start, 0)
        size, used = _read_varint(start, used)
        if count != 1 or not 0 < size <= _MOST_BLOCK_BYTES:
            raise DamagedError("no block")
        data = self._read_at(at + used, size + _SYNC_BYTES)
        if data[size:] != self._sync:
            raise DamagedError("no sync marker")
        return _parse(self._stream, data[:size]), at + used + size + _SYNC_BYTES

    def _find_sync(self, at: int) -> int | None:
        """Return the offset after the next sync marker."""
        window = 1 << 20
        while len(piece := self._read_at(at, window)) >= _SYNC_BYTES:
            found = piece.find(self._sync)
            if found >= 0:
                return at + found + _SYNC_BYTES
            at += len(piece) - _SYNC_BYTES + 1
        return None


def _parse(stream: Stream, data: bytes) -> Spooled:
    try:
        size = zstandard.frame_content_size(data)
        if not 0 < size <= _MOST_BLOCK_BYTES:
            raise DamagedError("no frame")
        raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedError(str(error)) from error
    try:
        return _batch(stream, raw)
    except _NO_BATCH as error:
        raise DamagedError(f"no batch: {error}") from error


def _batch(stream: Stream, raw: bytes) -> Spooled:
    """Parse a block's batch. Raises one of _NO_BATCH if it is invalid, which a correct checksum does not rule out."""
    file = io.BytesIO(raw)
    prefix: Any = fastavro.schemaless_reader(file, _PREFIX, None)
    count, at = _read_varint(raw, file.tell())
    lengths, key_numbers, key_lengths = (
        np.frombuffer(prefix[name], _U32).astype(np.int64) for name in ("lengths", "key_numbers", "key_lengths")
    )
    starts, key_starts = _starts(lengths), _starts(key_lengths)
    payload = np.frombuffer(raw, np.uint8, int(lengths.sum()), at)
    keys = np.frombuffer(prefix["keys"], np.uint8)
    if not 0 < count == len(lengths) == len(key_numbers) or key_lengths.sum() > len(keys):
        raise DamagedError("lengths do not fit")
    if not 0 <= prefix["first"] < _MOST_NUMBER - count or prefix["position"] < 0:
        raise DamagedError("a number is out of range")
    batch = EncodedBatch(stream, payload, starts, lengths, keys, key_starts[key_numbers], key_lengths[key_numbers])
    return Spooled(batch, prefix["first"], prefix["ring"], prefix["position"], prefix["reason"])


def _compact_keys(batch: EncodedBatch) -> tuple[Ints, bytes, Ints]:
    """Return the index of each message's key, the used keys concatenated, and their lengths."""
    is_first = np.diff(batch.key_starts, prepend=-1) != 0  # messages that share a key follow each other
    key_starts, lengths = batch.key_starts[is_first], batch.key_lengths[is_first]
    numbers = np.cumsum(is_first) - 1
    columns = np.arange(lengths.max())
    # Padding may reach past the last key.
    indexes = np.minimum(key_starts[:, None] + columns, len(batch.keys) - 1)
    return numbers, batch.keys[indexes[columns < lengths[:, None]]].tobytes(), lengths


def _starts(lengths: Ints) -> Ints:
    return np.cumsum(lengths) - lengths


def _varint(value: int) -> bytes:
    """Encode a number that is not negative as an Avro long."""
    value <<= 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an Avro long that is not negative, and the offset after it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise DamagedError("no number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
