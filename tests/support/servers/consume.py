"""Readers that share no code with the producer: kcat for topics, fastavro for values."""

import io
import re
import struct
import subprocess
from typing import Any, NamedTuple

from fastavro import schemaless_reader

# Sizes before bytes, so that keys and values may hold anything; -1 is a null.
KCAT_FORMAT = r"%p %o %T %K %S\n%k%s"
# kcat takes an empty fetch for the end of a partition. A fetch that waits would return new messages, so a topic under
# constant load would have no end.
KCAT_AT_ONCE = "fetch.wait.max.ms=0"
KCAT_HEADER = re.compile(rb"(\d+) (\d+) (-?\d+) (-?\d+) (-?\d+)\n")


class Message(NamedTuple):
    """A message in the topic; the timestamp is in milliseconds since 1970."""

    key: bytes | None
    value: bytes | None
    partition: int
    offset: int
    timestamp_ms: int


def kcat_messages(bootstrap: str, topic: str, *, timeout_s: float = 60.0) -> list[Message]:
    """Read all partitions of a topic from the beginning to the current end."""
    command = ["kcat", "-C", "-q", "-b", bootstrap, "-t", topic, "-o", "beginning", "-e", "-f", KCAT_FORMAT]
    command += ["-X", KCAT_AT_ONCE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')}")
    return parse_kcat(done.stdout)


def parse_kcat(output: bytes) -> list[Message]:
    """Parse kcat's output in KCAT_FORMAT."""
    messages = []
    position = 0
    while position < len(output):
        header = KCAT_HEADER.match(output, position)
        if header is None:
            raise ValueError(f"no message at byte {position}: {output[position : position + 40]!r}")
        partition, offset, timestamp_ms, key_size, value_size = map(int, header.groups())
        key, position = _take(output, header.end(), key_size)
        value, position = _take(output, position, value_size)
        messages.append(Message(key, value, partition, offset, timestamp_ms))
    return messages


def _take(output: bytes, position: int, size: int) -> tuple[bytes | None, int]:
    if size < 0:
        return None, position
    end = position + size
    if end > len(output):
        raise ValueError(f"{size} bytes wanted at byte {position}, {len(output) - position} there")
    return output[position:end], end


def decode(value: bytes, schema: dict[str, Any]) -> tuple[int, Any]:
    """Return schema id and record of a Confluent-framed value, all of whose bytes must be used.

    For many values pass what fastavro.parse_schema returned.
    """
    magic, schema_id = struct.unpack_from(">bI", value)
    if magic != 0:
        raise ValueError(f"magic byte {magic}, not 0")
    body = io.BytesIO(value[5:])
    record = schemaless_reader(body, schema)
    if rest := body.read():
        raise ValueError(f"{len(rest)} bytes after the record")
    return schema_id, record
