"""Seeds for the fuzzer of native/encode.c: the producer's own programs and random rows, in the layout of fuzz_encode.c.

python -m tests.native.seeds FOLDER
"""

import struct
import sys
from pathlib import Path

import numpy as np

from producer.encode.batch import Key, programs
from producer.encode.plan import Column, Kind, Program
from producer.events import STREAMS, Rows, Stream
from producer.schemas import load_schema
from tests.bench.goagent.rows import HOST_FIELDS, UTC_OFFSET_NS, random_rows

_REMEMBERED = struct.pack("<HH4s", 1, 4, bytes(4))
_ROWS = 3


def _u16(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}H", *numbers)


def seed(stream: Stream, key: Key, rows: Rows) -> bytes:
    """Return an input that encodes rows of a stream."""
    value, keys, _ = programs(stream, load_schema(stream.schema_file), b"\0\0\0\0\1", HOST_FIELDS, key)
    head = _u16(len(value.steps), len(keys.steps), len(value.strings), stream.dtype.itemsize)
    strings = b"".join(_u16(len(each)) + each for each in value.strings)
    steps = b"".join([*value.steps, *keys.steps])
    offset = struct.pack("<q", UTC_OFFSET_NS)
    return head + strings + steps + _u16(len(rows), 0) + rows.tobytes() + offset + _REMEMBERED * len(rows) + offset


def longest(kind: Kind) -> bytes:
    """Return an input in which one step writes as much as it ever does, in each of some rows."""
    program = Program([b"name", b"n"])
    dtype = np.dtype(("u1", 16)) if kind in (Kind.ADDRESS, Kind.KEY_ADDRESS, Kind.TEXT) else np.dtype("<u8")
    program.add(kind, "", Column(0, dtype), count=1)
    strings = b"".join(_u16(len(each)) + each for each in program.strings)
    body = _u16(_ROWS, 0) + b"\xff" * 16 * _ROWS + bytes(8)
    return _u16(1, 0, len(program.strings), 16) + strings + program.steps[0] + body


def main(folder: Path) -> None:
    """Write a seed for each stream and kind of key, and for each kind of step."""
    for kind in Kind:
        (folder / f"longest.{kind.name.lower()}").write_bytes(longest(kind))
    random = np.random.default_rng(1)
    for stream in STREAMS:
        for key in ("flow", "host"):
            (folder / f"{stream.name}.{key}").write_bytes(seed(stream, key, random_rows(stream, _ROWS, random)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
