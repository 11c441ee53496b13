"""The published schemas, their ids without a registry, and single records in Confluent's wire format."""

import io
import json
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

import fastavro

from producer.events import ALERTS, HEARTBEATS, STREAMS, Feed, SchemaId, Stream
from producer.paths import SCHEMAS

FIXED = {each.fixed_schema_id: each.schema_file for each in (*STREAMS, HEARTBEATS, ALERTS)}
"""All schemas by their ids without a registry."""


def load_schema(file: str) -> dict[str, Any]:
    """Return a published schema by its file name in schemas/."""
    schema: dict[str, Any] = json.loads((SCHEMAS / file).read_text())
    return schema


@cache
def streams() -> Mapping[str, Stream]:
    """Return the streams by the full names of their records."""
    schemas = {stream: load_schema(stream.schema_file) for stream in STREAMS}
    return {f"{schema['namespace']}.{schema['name']}": stream for stream, schema in schemas.items()}


def frame(schema_id: SchemaId) -> bytes:
    """Return the header of Confluent's wire format: a zero byte, and the schema id in 4 bytes."""
    return struct.pack(">bI", 0, schema_id)


class RecordEncoder:
    """Encodes single records of a feed in Confluent's wire format."""

    def __init__(self, feed: Feed, schema_id: SchemaId) -> None:
        self._schema = fastavro.parse_schema(load_schema(feed.schema_file))
        self._frame = frame(schema_id)

    def encode(self, record: Mapping[str, Any]) -> bytes:
        """Return the message's value."""
        value = io.BytesIO(self._frame)
        value.seek(len(self._frame))
        fastavro.schemaless_writer(value, self._schema, record, strict=True)
        return value.getvalue()
