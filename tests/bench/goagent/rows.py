"""Random ring records of a stream and the producer's own messages of them, for the Go encoder's test.

python -m tests.bench.goagent.rows STREAM COUNT. Writes records, keys and values in turn, each behind its u32 length.
"""

import struct
import sys

import numpy as np

from producer.encode.batch import BatchEncoder
from producer.events import CA_STATES, CAUSES, FLOW, HOOKS, STATES, STREAMS, Batch, Rows, Stream
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema

HOST_FIELDS = {"host": "test-host", "boot_id": "5e4a1cde-0000-4000-8000-123456789abc"}
UTC_OFFSET_NS = 1_700_000_000_123_456_789
FLOWS = 50
INTS = ("cpu", "payload_len", "segs", "retransmit_no", "pid")
"""Unsigned in the rings, but Avro ints."""
# One more than there are names of: a number without a name.
NAMED = {"state": len(STATES) + 1, "ca_state": len(CA_STATES) + 1, "cause": len(CAUSES) + 1}


def random_rows(stream: Stream, count: int, random: np.random.Generator) -> Rows:
    """Return rows of all bytes random, but for clocks and numbers, of a few flows; of numbers all lengths occur."""
    rows = np.frombuffer(random.bytes(count * stream.dtype.itemsize), stream.dtype).copy()
    flows = np.frombuffer(random.bytes(FLOWS * FLOW.itemsize), FLOW).copy()
    flows["hook"] %= len(HOOKS)
    flows["cgroup_id"] >>= np.uint64(1)  # an Avro long
    flows["sk_cookie"] >>= np.uint64(1)
    for row in range(0, FLOWS, 2):  # IPv4-mapped
        flows["saddr"][row, :12] = flows["daddr"][row, :12] = [*[0] * 10, 255, 255]
    segments = rows["s"] if "s" in (stream.dtype.names or ()) else rows
    segments["flow"] = flows[random.integers(0, FLOWS, count)]
    segments["ts"] >>= np.uint64(10)
    segments["cpu_seq"] >>= random.integers(1, 60, count).astype(np.uint64)
    for place in (segments, rows):
        for name, (member, *_) in (place.dtype.fields or {}).items():
            if member == np.uint64 and name not in ("ts", "cpu_seq"):
                place[name] >>= np.uint64(10)  # an Avro long; of a time a date in this century
            elif member == np.uint32 and name != "known":
                place[name] >>= random.integers(name in INTS, 32, count, np.uint32)
            elif name in NAMED:
                place[name] %= NAMED[name]
    return rows


def main(stream_name: str, count: int) -> None:
    """Write records, keys and values."""
    stream = next(each for each in STREAMS if each.name == stream_name)
    rows = random_rows(stream, count, np.random.default_rng())
    encoder = BatchEncoder(
        stream, load_schema(stream.schema_file), stream.fixed_schema_id, HOST_FIELDS, CgroupPaths(None)
    )
    messages = encoder.encode(Batch(stream, rows), UTC_OFFSET_NS)
    for row in range(count):
        key = messages.keys[messages.key_starts[row] :][: messages.key_lengths[row]]
        value = messages.payload[messages.starts[row] :][: messages.lengths[row]]
        for part in (rows[row].tobytes(), key.tobytes(), value.tobytes()):
            sys.stdout.buffer.write(struct.pack("<I", len(part)) + part)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
