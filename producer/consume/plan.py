"""Makes plans for the native decoder (native/decode.h) from accepted schemas."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_STEP = np.dtype([("type", "u1"), ("null", "u1"), ("other", "<u2"), ("column", "<i2"), ("_pad", "<u2")])
"""struct decode_step"""
_TYPES = {"boolean": 0, "int": 1, "long": 2, "float": 3, "double": 4, "bytes": 5, "string": 6}
_ARRAY, _END, _MAP = 7, 8, 9
_NOT_NULL, _NULL_FIRST, _NULL_LAST = 0, 1, 2
_SKIP = -1
_SCALARS = frozenset(_TYPES) - {"bytes"}

Fields = tuple[tuple[str, str], ...]
"""Names of fields with their types: long (also for int), double (also for float), string, or map (of strings).

A type with ? is of a field that may be null, or that the writer's schema may lack.
"""
TEXTS = frozenset({"string", "map"})
"""Types whose cells are texts: that of a map is a JSON object with its keys in order."""
_ALSO = {"long": {"long", "int"}, "double": {"double", "float"}, "string": {"string"}, "map": {"map"}}

_Step = tuple[int, int, int, int, int]


class FieldError(ValueError):
    """The schema has no field of this name and type."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps through a record of a schema, its full name, and the names and types of its columns."""

    record: str
    steps: bytes
    names: tuple[str, ...]
    types: tuple[str, ...]


def plan_for(schema: Mapping[str, Any], wanted: Fields) -> Plan:
    """Return the plan that decodes the wanted fields and skips all others; FieldError if one is missing."""
    types = {field["name"]: field["type"] for field in schema["fields"]}
    for name, kind in wanted:
        if kind.endswith("?"):
            if name not in types or _scalar(types[name]) in _ALSO[kind[:-1]]:
                continue
        elif isinstance(types.get(name), str) and types[name] in _ALSO[kind]:
            continue
        raise FieldError(f"no field {name} of type {kind}")
    return _plan(schema, [name for name, _ in wanted])


def plan_for_all(schema: Mapping[str, Any]) -> Plan:
    """Return the plan that decodes all fields but lists and bytes."""
    names = [field["name"] for field in schema["fields"] if _scalar(field["type"]) is not None]
    return _plan(schema, names)


def plan_for_names(schema: Mapping[str, Any], names: Collection[str]) -> Plan:
    """Return the plan that decodes those of these fields that the schema has and columns can hold."""
    return _plan(schema, [name for name in plan_for_all(schema).names if name in names])


def _plan(schema: Mapping[str, Any], names: Sequence[str]) -> Plan:
    fields = schema["fields"]
    columns = {name: column for column, name in enumerate(names)}
    steps: list[_Step] = []
    for field in fields:
        _append(steps, field["type"], columns.get(field["name"], _SKIP))
    types = {field["name"]: _scalar(field["type"]) or "" for field in fields}
    kinds = tuple(types.get(name, "") for name in names)
    return Plan(schema.get("name", ""), np.array(steps, _STEP).tobytes(), tuple(names), kinds)


def _scalar(kind: Any) -> str | None:
    """Return a type without null if a column can have it, otherwise None."""
    name, _ = _nullable(kind)
    if isinstance(name, dict) and name["type"] == "map":
        return "map"
    return name if isinstance(name, str) and name in _SCALARS else None


def _append(steps: list[_Step], kind: Any, column: int) -> None:
    name, null = _nullable(kind)
    if isinstance(name, str):
        steps.append((_TYPES[name], null, 0, column, 0))
        return
    if column != _SKIP:
        steps.append((_MAP, _NOT_NULL, 0, column, 0))
        return
    start = len(steps)
    steps.append((_ARRAY, _NOT_NULL, 0, _SKIP, 0))
    for item in _item_types(name):
        _append(steps, item, _SKIP)
    steps[start] = (_ARRAY, _NOT_NULL, len(steps), _SKIP, 0)
    steps.append((_END, _NOT_NULL, start, _SKIP, 0))


def _item_types(kind: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the types of which each item of an array or a map consists."""
    if kind["type"] == "map":
        yield from ("string", kind["values"])
        return
    items = kind["items"]
    if isinstance(items, dict) and items.get("type") == "record":
        yield from (field["type"] for field in items["fields"])
    else:
        yield items


def _nullable(kind: Any) -> tuple[Any, int]:
    """Return a type without null, and where null stands in its union."""
    if not isinstance(kind, list):
        return kind, _NOT_NULL
    first, last = kind
    return (last, _NULL_FIRST) if first == "null" else (first, _NULL_LAST)
