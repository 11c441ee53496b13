"""Blocks of Avro files: every codec is read, and what a file claims or decompresses to is bounded."""

import bz2
import io
import lzma
import tracemalloc
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
import pytest
import zstandard

import rebpf
from producer.consume.blocks import MOST_BYTES, Blocks
from producer.errors import IncompleteError, UnavailableError
from producer.events import FLOWS
from producer.schemas import load_schema
from tests.support.hostile_files import container


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "null": bytes,
    "deflate": deflated,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstandard": zstandard.compress,
}
COMPRESSED = [codec for codec in CODECS if codec != "null"]
SCHEMA: Any = load_schema(FLOWS.schema_file)


@cache
def zeros(codec: str) -> bytes:
    return CODECS[codec](bytes(4 * MOST_BYTES))


def bomb(codec: str, schema: Any = SCHEMA) -> bytes:
    return container(schema, zeros(codec), codec=codec.encode())


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec_is_read_by_block(codec: str) -> None:
    buffer = io.BytesIO()
    records = [{"n": number} for number in range(1000)]
    schema = {"type": "record", "name": "N", "fields": [{"name": "n", "type": "long"}]}
    fastavro.writer(buffer, schema, records, codec=codec, sync_interval=100)
    buffer.seek(0)
    blocks = [*Blocks(buffer)]
    assert len(blocks) > 10
    data = io.BytesIO(b"".join(data for _, data in blocks))
    assert [fastavro.schemaless_reader(data, schema, None) for count, _ in blocks for _ in range(count)] == records


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_block_that_decompresses_to_more_is_refused_within_the_limit(codec: str) -> None:
    file = io.BytesIO(bomb(codec))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"a block decompresses to more than {MOST_BYTES} bytes"):
            [*Blocks(file)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * MOST_BYTES


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("schema", [SCHEMA, [SCHEMA]], ids=["record", "union"])
def test_commands_refuse_such_a_file(tmp_path: Path, codec: str, schema: Any) -> None:
    path = tmp_path / "bomb.avro"
    path.write_bytes(bomb(codec, schema))
    with pytest.raises(IncompleteError, match="decompresses to more than"):
        rebpf.read(path, topic="tcp_flow")


def test_another_codec_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.avro"
    path.write_bytes(container(SCHEMA, b"a", codec=b"snappy"))
    with pytest.raises(UnavailableError, match=r"expected one of the codecs null, .*, found 'snappy'"):
        rebpf.read(path, topic="tcp_flow")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (b"\x02\x82\x80\x80\x10", "at most 16777216 bytes"),
        (b"\x02\x01", "at most 16777216 bytes"),
        (b"\x02", "at most 16777216 bytes"),
        (b"\x80", "ends within a number"),
        (b"\xff" * 11, "a number of at most 10 bytes"),
        (b"\x04\x02a" + bytes(16), "2 records in 1 bytes"),
        (b"\x01\x02a" + bytes(16), "-1 records in 1 bytes"),
        (b"\x02\x02a" + b"\1" * 16, "sync marker"),
        (b"\x02\x04a", "sync marker"),
    ],
)
def test_the_numbers_in_a_block_are_checked(block: bytes, message: str) -> None:
    whole = container(SCHEMA, b"a")
    file = io.BytesIO(whole[: -len(b"\x02\x02a") - 16] + block)
    with pytest.raises((ValueError, EOFError), match=message):
        [*Blocks(file)]


def test_a_header_without_end_is_refused() -> None:
    entry = b"\x02\x02a" + b"\xfe\xff\xff\xff\x0f"  # one entry, of 2 GiB
    with pytest.raises(ValueError, match="header"), open("/dev/zero", "rb") as endless:
        Blocks(_Endless(b"Obj\x01" + entry, endless))


class _Endless(io.RawIOBase):
    """A file that begins with `start` and goes on forever."""

    def __init__(self, start: bytes, then: Any) -> None:
        self._start, self._then = io.BytesIO(start), then

    def read(self, size: int = -1) -> bytes:
        assert 0 <= size <= 1 << 20
        return self._start.read(size) or self._then.read(size)
