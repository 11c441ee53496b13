"""Accepts a registry's schemas for decoding: only those of our records, of any version.

Whoever may write to a topic and to the registry chooses the schema, and so the cost of decoding: an `array of null`
makes a list of any length from a few bytes, and a recursive record exhausts the stack. So a schema is rebuilt from the
types that ours use. Each takes at least one byte, so a value has no more items than its message has bytes.

Our schemas are compatible both ways (FULL_TRANSITIVE), so every version has all fields without a default, and a field
has the same type in all versions. A schema that violates this is not ours, whatever its name. So decoded records have
the fields and types that our code expects.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import fastavro

from producer.host.text import parse_json
from producer.schemas import FIXED, load_schema

MOST_VALUE_BYTES = 1 << 20
"""Longest message value that is decoded."""
MOST_SCHEMA_BYTES = 64 << 10
"""Longest text of a schema."""

MOST_FIELDS = 200
"""Fields of a record; ours have up to 65."""

_NAMESPACE = "rebpf.v1"
_LEVELS = {"RebpfAgent": 3}
"""How deep our records are nested; 1 if not here."""
_PRIMITIVES = frozenset({"boolean", "int", "long", "float", "double", "bytes", "string"})
_SHOWN = 60


class NotAccepted(ValueError):
    """A schema is not ours; the message has the reason."""


def accepted(text: str) -> Any:
    """Parse a schema, without logical types, which only cost time; NotAccepted if it is not ours."""
    if len(text.encode(errors="replace")) > MOST_SCHEMA_BYTES:
        raise NotAccepted(f"its text is longer than {MOST_SCHEMA_BYTES} bytes")
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise NotAccepted("it is not JSON") from error
    if not isinstance(schema, dict):
        raise NotAccepted("it is not a record")
    namespace, _, name = _full_name(schema).rpartition(".")
    if namespace != _NAMESPACE or name not in _ours():
        raise NotAccepted(f"it is not a record of {_NAMESPACE}: {_shown(schema.get('name'))}")
    record = _record(schema, _LEVELS.get(name, 1))
    _require_fields(record, _ours()[name])
    try:
        return fastavro.parse_schema(record)
    except fastavro.schema.SchemaParseException as error:
        raise NotAccepted(str(error)[:_SHOWN]) from error


def accepted_container(text: str) -> list[Any]:
    """Parse a file's schema, which may be a union; NotAccepted unless all its records are ours and different."""
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise NotAccepted("its schema is not JSON") from error
    union = [accepted(json.dumps(each)) for each in (schema if isinstance(schema, list) else [schema])]
    if len({each["name"] for each in union}) < len(union):
        raise NotAccepted("it is a union with two records of one name")
    return union


def _full_name(schema: dict[str, Any]) -> str:
    name, namespace = schema.get("name"), schema.get("namespace", "")
    if not isinstance(name, str) or not isinstance(namespace, str):
        return ""
    return name if "." in name else f"{namespace}.{name}"


def _record(schema: dict[str, Any], levels: int) -> dict[str, Any]:
    fields = schema.get("fields")
    if schema.get("type") != "record" or not isinstance(fields, list) or not fields:
        raise NotAccepted("it has something other than a record with fields")
    if len(fields) > MOST_FIELDS:
        raise NotAccepted(f"it has a record with more than {MOST_FIELDS} fields")
    if levels == 0:
        raise NotAccepted("it nests records deeper than ours")
    name = _full_name({"namespace": _NAMESPACE, **schema})
    return {"type": "record", "name": name, "fields": [_field(field, levels) for field in fields]}


@cache
def _ours() -> Mapping[str, Mapping[str, Any]]:
    """Return this version's schemas by the names of their records."""
    return {schema["name"]: schema for schema in map(load_schema, FIXED.values())}


def _require_fields(record: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise NotAccepted if a required field is missing, or a field has another type than ours."""
    types = {field["name"]: field["type"] for field in record["fields"]}
    if len(types) < len(record["fields"]):
        raise NotAccepted("it has two fields with one name")
    for field in ours["fields"]:
        name, kind = field["name"], field["type"]
        if name not in types:
            if "default" not in field:
                raise NotAccepted(f"it has no field {name}")
        elif (nested := _nested(kind)) is None:
            if types[name] != _type(kind, 0):
                raise NotAccepted(f"its field {name} has another type than ours")
        elif (found := _nested(types[name])) is None:
            raise NotAccepted(f"its field {name} is not a list of records")
        else:
            _require_fields(found, nested)


def _nested(kind: Any) -> Mapping[str, Any] | None:
    """Return the record type of a list of records; None for other types."""
    items = kind.get("items") if isinstance(kind, dict) else None
    return items if isinstance(items, dict) and items.get("type") == "record" else None


def _field(field: Any, levels: int) -> dict[str, Any]:
    if not isinstance(field, dict) or not isinstance(field.get("name"), str):
        raise NotAccepted("it has a field without a name")
    return {"name": field["name"], "type": _type(field.get("type"), levels)}


def _type(kind: Any, levels: int) -> Any:
    if isinstance(kind, list) and len(kind) == 2 and kind.count("null") == 1:  # null or another type
        return [each if each == "null" else _primitive(each) for each in kind]
    if isinstance(kind, dict) and kind.get("type") == "array":
        items = kind.get("items")
        if isinstance(items, dict) and items.get("type") == "record":
            return {"type": "array", "items": _record(items, levels - 1)}
        return {"type": "array", "items": _primitive(items)}
    if isinstance(kind, dict) and (kind.get("type"), kind.get("values")) == ("map", "string"):
        return {"type": "map", "values": "string"}
    return _primitive(kind)


def _primitive(kind: Any) -> str:
    name = kind.get("type") if isinstance(kind, dict) else kind
    if not isinstance(name, str) or name not in _PRIMITIVES:
        raise NotAccepted(f"it has a type that ours do not use: {_shown(kind)}")
    return name


def _shown(part: Any) -> str:
    return repr(part)[:_SHOWN]
