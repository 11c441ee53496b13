"""Reads an event's id and time, without decoding the rest of the record."""

import io
from collections.abc import Mapping
from typing import Any

import fastavro

from producer.consume.decode import MOST_SCHEMAS, MOST_TEXT, Decoder, UndecodableError, unframed

_TYPES = {"ts_ns": {"long"}, "host": {"string"}, "boot_id": {"string"}, "cpu": {"int", "long"}, "cpu_seq": {"long"}}


class EventIdReader:
    """Decodes with the message's schema, truncated after the last field of _TYPES.

    1.3 us, a tenth of the cost of the whole record; a reader schema that skips the rest saves only a quarter.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._schemas: dict[int, Any] = {}

    def read(self, value: bytes | None) -> Mapping[str, Any]:
        """Return these fields and those between them; the rest is not checked."""
        schema_id, body = unframed(value)
        schema = self._schemas.get(schema_id) or self._id_schema(schema_id)
        try:
            record: Any = fastavro.schemaless_reader(io.BytesIO(body), schema, None)
        except (EOFError, ValueError, IndexError, OverflowError, MemoryError) as exc:
            raise UndecodableError(f"not a value of schema {schema_id}") from exc
        if len(record["host"]) > MOST_TEXT or len(record["boot_id"]) > MOST_TEXT:
            raise UndecodableError(f"a string is longer than {MOST_TEXT} characters")
        if not (0 < record["cpu_seq"] < 1 << 63 and -1 << 63 <= record["ts_ns"] < 1 << 63):
            raise UndecodableError("cpu_seq or ts_ns is out of range")
        return record  # type: ignore[no-any-return]  # _cut ensures that it is a record

    def _id_schema(self, schema_id: int) -> Any:
        schema = self._cut(schema_id)  # the decoder remembers rejected ids
        if len(self._schemas) >= MOST_SCHEMAS:
            self._schemas.clear()
        self._schemas[schema_id] = schema
        return schema

    def _cut(self, schema_id: int) -> Any:
        schema = self._decoder.schema(schema_id)
        fields = schema.get("fields", []) if isinstance(schema, dict) else []
        at = {field["name"]: number for number, field in enumerate(fields)}
        for name, types in _TYPES.items():
            if name not in at or _plain(fields[at[name]]["type"]) not in types:
                raise UndecodableError(f"schema {schema_id} has no field {name} of our type")
        last = max(at[name] for name in _TYPES)
        return fastavro.parse_schema({"type": "record", "name": "EventId", "fields": fields[: last + 1]})


def _plain(kind: Any) -> Any:
    return kind["type"] if isinstance(kind, dict) else kind
