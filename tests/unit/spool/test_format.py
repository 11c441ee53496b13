"""A spool file: batches are read back as written, any Avro reader reads it, and damage costs only what it touches."""

import io
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer.encode.batch import BatchEncoder, Key
from producer.events import RETRANSMITS, STREAMS, TRANSMITS, Batch, EncodedBatch, SchemaId, Stream, common
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from producer.spool.format import DamagedError, Reader, Spooled, block, container_schema, header, read_header
from tests.bench import stages

Message = tuple[bytes, bytes]
SYNC = bytes(range(16))
IDENTITY = {"type": "fixed", "name": "Id", "size": 8}
SCHEMA: dict[str, Any] = {"type": "record", "name": "Event", "fields": [{"name": "id", "type": IDENTITY}]}
HOST = {"host": "db-1", "boot_id": "5f0c0e2a-9e3e-4d0d-8f0e-5a2f0d1c7b11"}


def batch_of(messages: Sequence[Message], gap: int = 7) -> EncodedBatch:
    """Lay messages out as the encoder does, with gaps behind each, and keys of one width that rows share."""
    keys = sorted({key for key, _ in messages})
    width = max(map(len, keys)) + gap
    numbers = np.array([keys.index(key) for key, _ in messages], np.int64)
    lengths = np.array([len(value) for _, value in messages], np.int64)
    return EncodedBatch(
        TRANSMITS,
        np.frombuffer(b"".join(value + b"\xee" * gap for _, value in messages), np.uint8),
        np.concatenate([[0], np.cumsum(lengths + gap)[:-1]]).astype(np.int64),
        lengths,
        np.frombuffer(b"".join(key.ljust(width, b"\xee") for key in keys), np.uint8),
        numbers * width,
        np.array([len(key) for key in keys], np.int64)[numbers],
    )


def messages_of(batch: EncodedBatch) -> list[Message]:
    keys = [batch.keys[at:][:size].tobytes() for at, size in zip(batch.key_starts, batch.key_lengths, strict=True)]
    values = [batch.payload[at:][:size].tobytes() for at, size in zip(batch.starts, batch.lengths, strict=True)]
    return list(zip(keys, values, strict=True))


def facts(spooled: Spooled) -> tuple[Any, ...]:
    return spooled.first, spooled.end, spooled.ring, spooled.position, spooled.reason, messages_of(spooled.batch)


def numbered(count: int, start: int = 0) -> list[Message]:
    return [(b"key %d" % (n % 5), bytes(5) + n.to_bytes(8, "big")) for n in range(start, start + count)]


def file_of(batches: Sequence[Spooled], schema: Mapping[str, Any] = SCHEMA) -> bytes:
    start = header(container_schema(schema), {"rebpf.made": "{}"}, SYNC)
    return start + b"".join(block(each, SYNC) for each in batches)


def reader_of(data: bytes, stream: Stream = TRANSMITS) -> Reader:
    start, sync, _ = read_header(data[: 1 << 16])
    return Reader(stream, sync, start, lambda offset, size: data[offset : offset + size])


def read_all(reader: Reader) -> list[Spooled]:
    found = []
    while spooled := reader.next():
        found.append(spooled)
    return found


messages = st.lists(st.tuples(st.binary(max_size=30), st.binary(min_size=5, max_size=60)), min_size=1, max_size=30)
places = st.tuples(st.integers(0, 1 << 62), st.text(max_size=20), st.integers(0, 1 << 62), st.text(max_size=20))


@given(st.lists(st.tuples(messages, st.integers(0, 9), places), max_size=4))
def test_batches_are_read_as_written(drawn: list[Any]) -> None:
    written = [Spooled(batch_of(told, gap), *place) for told, gap, place in drawn]
    reader = reader_of(file_of(written))

    assert [facts(each) for each in read_all(reader)] == [facts(each) for each in written]
    assert not reader.damaged


@pytest.mark.parametrize("count", [1, 4096])
def test_batches_of_any_size_are_read_back(count: int) -> None:
    (back,) = read_all(reader_of(file_of([Spooled(batch_of(numbered(count)), 7, "ring", 9, "")])))
    assert messages_of(back.batch) == numbered(count)
    assert (back.first, back.end) == (7, 7 + count)
    assert back.batch.stream == TRANSMITS


def test_some_messages_of_a_batch_are_a_batch() -> None:
    """As those that Kafka has refused."""
    some = batch_of(numbered(100)).take(np.array([3, 50, 99]))
    (back,) = read_all(reader_of(file_of([Spooled(some, 0, "", 0, "INVALID_RECORD")])))
    assert messages_of(back.batch) == [numbered(100)[n] for n in (3, 50, 99)]
    assert back.reason == "INVALID_RECORD"


def test_keys_in_use_are_kept_once_and_others_not_at_all() -> None:
    """An encoder's keys are those of all flows since it began."""
    many = batch_of([(os.urandom(40), bytes(13)) for _ in range(2000)])
    one_key = many.take(np.full(2000, 1234))
    assert len(block(Spooled(one_key, 0, "", 0, ""), SYNC)) < 400


def test_a_reader_goes_on_when_more_is_written() -> None:
    batches = [Spooled(batch_of(numbered(3, at)), at, "", 0, "") for at in (0, 3, 6)]
    whole = file_of(batches)
    ends = [len(file_of(batches[:count])) for count in range(4)]
    start, sync, _ = read_header(whole)
    size = ends[1]
    reader = Reader(TRANSMITS, sync, start, lambda offset, count: whole[:size][offset : offset + count])
    assert [each.first for each in read_all(reader)] == [0]
    size = ends[2] - 1
    assert reader.next() is None
    size = ends[3]
    assert [each.first for each in read_all(reader)] == [3, 6]
    assert not reader.damaged


def test_files_of_other_formats_and_versions_are_refused() -> None:
    plain = io.BytesIO()
    fastavro.writer(plain, container_schema(SCHEMA), [], metadata={"rebpf.format": "2"})
    own = file_of([])
    for data in (b"", b"Obj\x01", bytes(1000), own[:-1], own[: len(own) // 2], plain.getvalue()):
        with pytest.raises(DamagedError):
            read_header(data)
    assert read_header(own)[2]["rebpf.made"] == "{}"


@cache
def encoder_of(stream: Stream, key: Key) -> BatchEncoder:
    return BatchEncoder(stream, load_schema(stream.schema_file), SchemaId(70_000), HOST, CgroupPaths(None), key)


@pytest.mark.parametrize("key", ["flow", "host"])
@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_fastavro_reads_a_file_whose_events_are_those_of_the_messages(stream: Stream, key: Key) -> None:
    rows = np.zeros(stages.ROWS, stream.dtype)
    common(rows)["flow"], common(rows)["ts"] = stages.rows()["s"]["flow"], stages.rows()["s"]["ts"]
    schema = load_schema(stream.schema_file)
    encoder = encoder_of(stream, key)
    sizes = (1, 1000, stages.ROWS - 1001)
    written, first = [], 0
    for size in sizes:
        encoded = encoder.encode(Batch(stream, rows[first : first + size]), stages.UTC_OFFSET_NS)
        written.append(Spooled(encoded, first, "ring", first * 200, ""))
        first += size
    data = file_of(written, schema)
    back = read_all(reader_of(data, stream))
    assert [facts(each) for each in back] == [facts(each) for each in written]

    read = fastavro.reader(io.BytesIO(data))
    assert read.codec == "zstandard"
    records: list[Any] = list(read)
    parsed = fastavro.parse_schema(schema)
    for record, spooled in zip(records, written, strict=True):
        told = messages_of(spooled.batch)
        assert (record["first"], record["ring"], record["position"]) == (spooled.first, "ring", spooled.position)
        assert [message["frame"] for message in record["messages"]] == [value[:5] for _, value in told]
        events = [fastavro.schemaless_reader(io.BytesIO(value[5:]), parsed, None) for _, value in told]
        assert [message["event"] for message in record["messages"]] == events
        lengths, numbers, key_lengths = (
            np.frombuffer(record[name], "<u4") for name in ("lengths", "key_numbers", "key_lengths")
        )
        assert lengths.tolist() == [len(value) for _, value in told]
        ends = np.cumsum(key_lengths)
        keys = [record["keys"][end - size : end] for end, size in zip(ends, key_lengths, strict=True)]
        assert [keys[number] for number in numbers] == [key for key, _ in told]
        assert key == "flow" or len(keys) == 1


WRITTEN = [Spooled(batch_of(numbered(8, at)), at, "ring", at, "") for at in range(0, 48, 8)]
FILE = file_of(WRITTEN)
ENDS = [len(file_of(WRITTEN[:count])) for count in range(len(WRITTEN) + 1)]
"""Where the header ends, and each block, behind its sync marker."""


def assert_read(data: bytes, touched: set[int], *, told: bool = True) -> None:
    """What is read was written, in order, and of what was written only the batches `touched` are missing.

    The reader has told of it, unless `told` is false.
    """
    reader = reader_of(data)
    back = read_all(reader)
    wanted = {each.first: facts(each) for each in WRITTEN}
    firsts = [each.first for each in back]
    assert firsts == sorted(set(firsts))
    for each in back:
        assert facts(each) == wanted[each.first]
    last = reader_of(data).last(len(data))
    assert (last and last.first) == (firsts[-1] if firsts else None)
    missing = {number for number, each in enumerate(WRITTEN) if each.first not in firsts}
    assert missing <= touched
    if told and missing and max(missing) + 1 < len(WRITTEN):
        assert reader.damaged


def block_at(offset: int) -> int:
    return next(number for number, end in enumerate(ENDS[1:]) if offset < end)


@given(st.integers(ENDS[0], len(FILE) - 1), st.integers(1, 255))
def test_a_changed_byte_costs_the_batch_that_it_is_in(offset: int, change: int) -> None:
    """And the next one, if it is in the marker that says where that begins."""
    data = bytearray(FILE)
    data[offset] ^= change
    number = block_at(offset)
    in_marker = offset >= ENDS[number + 1] - len(SYNC)
    assert_read(bytes(data), {number, number + 1} if in_marker else {number})


@given(st.integers(0, len(FILE) - 1), st.binary(min_size=1, max_size=200))
def test_bytes_written_over_cost_what_they_touch_and_up_to_the_next_marker(offset: int, noise: bytes) -> None:
    data = FILE[:offset] + noise + FILE[offset + len(noise) :]
    if offset < ENDS[0]:
        # The header is one thing: as it was, or the file says nothing.
        try:
            read_header(data)
        except DamagedError:
            return
        assert_read(data, set(range(len(WRITTEN))))
        return
    last = block_at(min(offset + len(noise), len(FILE)) - 1)
    assert_read(data, set(range(block_at(offset), last + 2)))


@given(st.integers(ENDS[0], len(FILE)))
def test_a_file_that_is_cut_off_has_all_whole_batches(size: int) -> None:
    whole = sum(end <= size for end in ENDS[1:])
    assert_read(FILE[:size], set(range(whole, len(WRITTEN))))


@given(st.integers(ENDS[0], len(FILE)), st.integers(1, 400))
@example(ENDS[1], ENDS[3] - ENDS[1])
def test_a_piece_that_is_missing_costs_what_it_touches(offset: int, size: int) -> None:
    """Where what is left fits together, only the batches' numbers tell of it."""
    data = FILE[:offset] + FILE[offset + size :]
    if offset == len(FILE):
        assert_read(data, set())
        return
    last = block_at(min(offset + size, len(FILE)) - 1)
    assert_read(data, set(range(block_at(offset), last + 2)), told=False)


def test_damage_is_skipped_in_a_file_longer_than_one_read() -> None:
    """The next marker is further away than one piece that is searched, and lies across two pieces."""
    noise = os.urandom((1 << 20) - 3)
    data = FILE[: ENDS[1]] + noise + SYNC + FILE[ENDS[1] :]
    assert_read(data, set())
    reader = reader_of(data)
    assert len(read_all(reader)) == len(WRITTEN)
    assert reader.damaged


@pytest.mark.parametrize("size", [100, 1 << 18])
def test_only_the_end_of_a_long_file_is_read_for_its_last_batch(size: int) -> None:
    """Also if the last batch is larger than what is looked at first."""
    wanted = Spooled(batch_of([(b"key", os.urandom(size))]), 48, "ring", 48, "")
    noise = [block(Spooled(batch_of([(b"key", os.urandom(1 << 20))]), 0, "ring", 0, ""), SYNC)] * 80
    data = b"".join([file_of([]), *noise, block(wanted, SYNC)])
    start, sync, _ = read_header(data[: 1 << 16])
    reads: list[int] = []

    def read_at(offset: int, count: int) -> bytes:
        reads.append(offset)
        return data[offset : offset + count]

    last = Reader(TRANSMITS, sync, start, read_at).last(len(data))
    assert last is not None
    assert facts(last) == facts(wanted)
    assert min(reads) > len(data) - (66 << 20 if size > 100 else 1 << 19)


def test_a_size_that_ends_at_a_later_marker_is_no_block() -> None:
    """A frame, and what follows it up to another marker: the frame alone would be read, and what follows lost."""
    size_at, data = ENDS[0] + 1, bytearray(FILE)
    first, second = ENDS[1] - ENDS[0], ENDS[2] - ENDS[1]
    length = first - 1 - 2 - len(SYNC) + second  # two bytes of size
    assert 64 <= length < 8192
    data[size_at : size_at + 2] = bytes([length << 1 & 0x7F | 0x80, length >> 6])
    assert_read(bytes(data), {0})


def test_the_streams_differ() -> None:
    data = file_of([Spooled(batch_of(numbered(1)), 0, "", 0, "")])
    assert read_all(reader_of(data, RETRANSMITS))[0].batch.stream == RETRANSMITS
