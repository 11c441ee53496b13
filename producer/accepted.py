"""Which schemas of a registry messages are decoded with: those of our records, in this version or another.

Whoever may write to a topic and to the registry chooses the schema, and with it what decoding costs: an `array of null`
makes a list of any length from a few bytes, a record within itself exhausts the stack. So a schema is made anew of the
parts that ours consist of, and each of them takes at least one byte: a value has no more items than its message bytes.
"""

import json
from typing import Any

import fastavro

MOST_VALUE_BYTES = 1 << 20
"""Longest message value that is decoded."""
MOST_SCHEMA_BYTES = 64 << 10
"""Longest text of a schema."""

_NAMESPACE = "rebpf.v1"
_LEVELS = {"TcpTransmit": 1, "TcpRetransmit": 1, "TcpAlert": 1, "RebpfAgent": 3}
"""Our records, and how deep they have records in lists."""
_PRIMITIVES = frozenset({"boolean", "int", "long", "float", "double", "bytes", "string"})
_SHOWN = 60


class NotAccepted(ValueError):
    """A schema that none of our records has; the text says what is wrong."""


def accepted(text: str) -> Any:
    """Return a schema parsed, without its logical types, which only cost time; NotAccepted where it is not ours."""
    if len(text.encode(errors="replace")) > MOST_SCHEMA_BYTES:
        raise NotAccepted(f"its text is longer than {MOST_SCHEMA_BYTES} bytes")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotAccepted("it is not JSON") from error
    if not isinstance(schema, dict):
        raise NotAccepted("it is not a record")
    namespace, _, name = _full_name(schema).rpartition(".")
    if namespace != _NAMESPACE or name not in _LEVELS:
        raise NotAccepted(f"it is not a record of {_NAMESPACE}: {_shown(schema.get('name'))}")
    try:
        return fastavro.parse_schema(_record(schema, _LEVELS[name]))
    except fastavro.schema.SchemaParseException as error:
        raise NotAccepted(str(error)[:_SHOWN]) from error


def _full_name(schema: dict[str, Any]) -> str:
    name, namespace = schema.get("name"), schema.get("namespace", "")
    if not isinstance(name, str) or not isinstance(namespace, str):
        return ""
    return name if "." in name else f"{namespace}.{name}"


def _record(schema: dict[str, Any], levels: int) -> dict[str, Any]:
    fields = schema.get("fields")
    if schema.get("type") != "record" or not isinstance(fields, list) or not fields:
        raise NotAccepted("it has something else than a record with fields")
    if levels == 0:
        raise NotAccepted("it has records within records where ours have none")
    name = _full_name({"namespace": _NAMESPACE, **schema})
    return {"type": "record", "name": name, "fields": [_field(field, levels) for field in fields]}


def _field(field: Any, levels: int) -> dict[str, Any]:
    if not isinstance(field, dict) or not isinstance(field.get("name"), str):
        raise NotAccepted("it has a field without a name")
    return {"name": field["name"], "type": _type(field.get("type"), levels)}


def _type(kind: Any, levels: int) -> Any:
    if isinstance(kind, list) and len(kind) == 2 and kind.count("null") == 1:  # null and another
        return [each if each == "null" else _primitive(each) for each in kind]
    if isinstance(kind, dict) and kind.get("type") == "array":
        items = kind.get("items")
        if isinstance(items, dict) and items.get("type") == "record":
            return {"type": "array", "items": _record(items, levels - 1)}
        return {"type": "array", "items": _primitive(items)}
    return _primitive(kind)


def _primitive(kind: Any) -> str:
    name = kind.get("type") if isinstance(kind, dict) else kind
    if not isinstance(name, str) or name not in _PRIMITIVES:
        raise NotAccepted(f"it has a type that ours do not have: {_shown(kind)}")
    return name


def _shown(part: Any) -> str:
    return repr(part)[:_SHOWN]
