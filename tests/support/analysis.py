"""Events as records, in the files that export and report read."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np

from producer.events import EncodedBatch, Stream
from producer.host.clock import now
from producer.schemas import frame, load_schema
from producer.spool.spool import Spool
from tests.support.records import VALUES, type_name

DAY_NS = 86_400_000_000_000
NOON_NS = 1_790_000_000_000_000_000 // DAY_NS * DAY_NS + DAY_NS // 2
"""Of 2026-09-21."""


def record(stream: Stream, **fields: Any) -> dict[str, Any]:
    """Return an event; fields that are not given are null, or have some value of their type."""
    schema = load_schema(stream.schema_file)["fields"]
    made = {each["name"]: each["default"] if "default" in each else VALUES[type_name(each["type"])] for each in schema}
    unknown = fields.keys() - made
    assert not unknown
    made.update(ts_ns=NOON_NS, sample_rate=1)
    made.update(fields)
    return {**made, "ts": made["ts_ns"] // 1_000_000}


def write_container(path: Path, stream: Stream, records: Sequence[dict[str, Any]], codec: str = "null") -> Path:
    """Write an Avro object container file, as any tool does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fastavro.writer(file, load_schema(stream.schema_file), records, codec=codec, sync_interval=4000)
    return path


def write_spool(folder: Path, stream: Stream, records: Sequence[dict[str, Any]]) -> Path:
    """Write a stream's spool with one batch."""
    spool = Spool(folder, stream, load_schema(stream.schema_file), now, max_bytes=1 << 24)
    spool.open()
    spool.append(encoded(stream, records), "ring", 1)
    spool.close()
    return folder


def encoded(stream: Stream, records: Sequence[dict[str, Any]]) -> EncodedBatch:
    """Return the messages of records."""
    messages = [message(stream, each) for each in records]
    lengths = np.array(list(map(len, messages)), np.int64)
    keys, zeros = np.frombuffer(b"host", np.uint8), np.zeros(len(messages), np.int64)
    payload = np.frombuffer(b"".join(messages), np.uint8)
    return EncodedBatch(stream, payload, np.cumsum(lengths) - lengths, lengths, keys, zeros, zeros + len(keys))


def message(stream: Stream, each: dict[str, Any]) -> bytes:
    """Return a record in Confluent's wire format, with the fixed schema id."""
    value = io.BytesIO(frame(stream.fixed_schema_id))
    value.seek(0, io.SEEK_END)
    fastavro.schemaless_writer(value, fastavro.parse_schema(load_schema(stream.schema_file)), each, strict=True)
    return value.getvalue()
