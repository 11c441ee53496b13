"""From a message's bytes to a record: the reader's side of the Confluent frame, by fastavro and not by our encoder."""

import io
import json
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import fastavro

from producer.config import Registry
from producer.errors import UnavailableError
from producer.events import STREAMS, SchemaId
from producer.paths import SCHEMAS
from producer.registry_client import open_client

_FRAME = struct.Struct(">bI")
_REGISTRY_TIMEOUT_S = 10


class UndecodableError(ValueError):
    """A message that is not one of ours, or whose schema is not to be had."""


def unframed(value: bytes | None) -> tuple[int, bytes]:
    """Return the schema id and the body of a value in Confluent's frame."""
    if value is None or len(value) < _FRAME.size or value[0] != 0:
        raise UndecodableError("not in Confluent's frame")
    return _FRAME.unpack_from(value)[1], value[_FRAME.size :]


class Decoder:
    """Decodes Confluent-framed Avro; without a registry the ids are the fixed ones of this version's own schemas.

    Those of the events are known, and `others` are by their ids.
    """

    def __init__(
        self, registry: Registry | str | None, others: Mapping[SchemaId, Mapping[str, Any]] = MappingProxyType({})
    ) -> None:
        self._schemas: dict[int, Any] = {}
        self._client = None
        settings = registry if isinstance(registry, Registry) else Registry(registry, timeout_s=_REGISTRY_TIMEOUT_S)
        if settings.url is None:
            for stream in STREAMS:
                text = (SCHEMAS / stream.schema_file).read_text()
                self._schemas[stream.fixed_schema_id] = _plain_schema(text)
            for number, schema in others.items():
                self._schemas[number] = _plain_schema(json.dumps(schema))
        else:
            self._client = open_client(settings, retries=2)

    def decode(self, value: bytes | None) -> dict[str, Any]:
        """Return the record; numbers stay numbers, also where the schema calls them times."""
        schema_id, body = unframed(value)
        schema = self.schema(schema_id)
        buffer = io.BytesIO(body)
        try:
            record = fastavro.schemaless_reader(buffer, schema, None)
        except (EOFError, ValueError, IndexError, OverflowError, MemoryError) as exc:
            raise UndecodableError(f"not a value of schema {schema_id}") from exc
        if buffer.tell() != len(body) or not isinstance(record, dict):
            raise UndecodableError(f"not a value of schema {schema_id}")
        return record

    def schema(self, schema_id: int) -> Any:
        """Return an id's schema, parsed and without logical types."""
        return self._schemas.get(schema_id) or self._fetch(schema_id)

    def _fetch(self, schema_id: int) -> Any:
        if self._client is None:
            raise UndecodableError(f"schema id {schema_id} is not one of the fixed ids: give --registry")
        try:
            schema = self._client.get_schema(schema_id)
        except Exception as exc:  # Its own error or one of whichever HTTP library it found: there is no common base.
            if getattr(exc, "http_status_code", None) == 404:
                raise UndecodableError(f"the registry does not know schema id {schema_id}") from exc
            raise UnavailableError(f"the schema registry does not answer for schema id {schema_id}: {exc}") from exc
        self._schemas[schema_id] = _plain_schema(schema.schema_str or "")
        return self._schemas[schema_id]


def _plain_schema(text: str) -> Any:
    """Parse a schema and leave its logical types out, which only cost time here."""
    return fastavro.parse_schema(json.loads(text, object_hook=_without_logical_type))


def _without_logical_type(part: dict[str, Any]) -> dict[str, Any]:
    part.pop("logicalType", None)
    return part
