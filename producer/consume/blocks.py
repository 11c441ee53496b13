"""Reads Avro object container files by block, with a limit on what a block may decompress to.

fastavro's readers decompress a block at once: a file of a megabyte could take gigabytes of memory. Specification:
https://avro.apache.org/docs/1.12.0/specification/#object-container-files.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

import fastavro
import zstandard

MOST_BYTES = 1 << 24
"""Most bytes of a block, compressed or not. Writers make blocks of kilobytes."""
_MOST_HEADER_BYTES = 1 << 20
_SYNC_BYTES = 16
_MOST_VARINT_BYTES = 10

_CODECS: Mapping[str, Callable[[bytes, int], bytes]] = {
    "null": lambda data, limit: data,
    "deflate": lambda data, limit: zlib.decompressobj(-15).decompress(data, limit),
    "bzip2": lambda data, limit: bz2.BZ2Decompressor().decompress(data, limit),
    "xz": lambda data, limit: lzma.LZMADecompressor(memlimit=8 * MOST_BYTES).decompress(data, limit),
    "zstandard": lambda data, limit: zstandard.ZstdDecompressor().stream_reader(data).read(limit),
}
"""By codec, a function that returns at most `limit` bytes."""


class CodecError(ValueError):
    """The file is compressed by a codec that we do not know."""


class _Header:
    """Passes on what is read of a file, up to a limit; the file may be a pipe."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.content = b""

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        data = self._file.read(min(size, _MOST_HEADER_BYTES - len(self.content)))
        self.content += data
        return data


class Blocks:
    """The blocks of a file: their numbers of records, and their data. Invalid files can raise anything."""

    def __init__(self, file: BinaryIO) -> None:
        header = _Header(file)
        self.metadata: Mapping[str, str] = dict(fastavro.block_reader(cast(Any, header)).metadata)
        codec = self.metadata.get("avro.codec", "null")
        if codec not in _CODECS:
            raise CodecError(f"expected one of the codecs {', '.join(_CODECS)}, found {codec!r:.40}")
        self._decompress = _CODECS[codec]
        self._sync = header.content[-_SYNC_BYTES:]
        self._file = file

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        while (count := self._number()) is not None:
            size = self._number()
            if size is None or not 0 <= size <= MOST_BYTES:
                raise ValueError(f"expected a block of at most {MOST_BYTES} bytes")
            data = self._file.read(size)
            if self._file.read(_SYNC_BYTES) != self._sync:
                raise ValueError("expected a sync marker after a block")
            data = self._decompress(data, MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise ValueError(f"a block decompresses to more than {MOST_BYTES} bytes")
            if not 0 <= count <= len(data):  # a record of ours has at least a byte
                raise ValueError(f"expected {count} records in {len(data)} bytes")
            yield count, data

    def _number(self) -> int | None:
        """Read an Avro long; None at the end of the file."""
        value = 0
        for at in range(_MOST_VARINT_BYTES):
            byte = self._file.read(1)
            if not byte:
                if at:
                    raise EOFError("the file ends within a number")
                return None
            value |= (byte[0] & 0x7F) << (7 * at)
            if byte[0] < 0x80:
                return (value >> 1) ^ -(value & 1)
        raise ValueError("expected a number of at most 10 bytes")
