"""Turns a record schema and a row's layout into a program of steps for producer._native.Encoder (native/encode.h).

A field of the schema has one of these sources: a column of the rows, a constant, or the cache of strings by id. The
bytes are those of fastavro, which encodes constants and names here.
"""

import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import fastavro
import numpy as np

from producer.errors import SchemaError

Schema = Mapping[str, Any]

_STEP = struct.Struct("<6B2x4IqQq")
_LIMITS = {"int": (-(1 << 31), (1 << 31) - 1), "long": (-(1 << 63), (1 << 63) - 1)}
_PRIMITIVES = {*_LIMITS, "boolean", "string", "bytes", "float", "double", "null"}


class Kind(IntEnum):
    """enum step_kind of native/encode.h."""

    CONSTANT = 0
    INTEGER = 1
    BOOLEAN = 2
    NAME = 3
    ADDRESS = 4
    CACHED = 5
    KEY_ADDRESS = 6
    KEY_NUMBER = 7
    TEXT = 8


@dataclass(frozen=True, slots=True)
class Column:
    """A member of the rows: an integer, an address of 16 bytes, or a text up to its first zero, at `offset`.

    `known` is a byte's offset and a mask: the field is null, if it can be, unless a bit of the mask is set there.
    A number with `names` becomes the name with this index; the last one stands for all higher numbers. Other numbers
    become (number + offset to UTC if `utc`) // divisor, and are not encodable above `most`.
    """

    offset: int
    dtype: "np.dtype[Any]"
    known: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()
    utc: bool = False
    divisor: int = 1
    most: int = (1 << 64) - 1
    is_text: bool = False


@dataclass(slots=True)
class Program:
    """Steps in the layout of struct step, their strings, and the field of each step."""

    strings: list[bytes] = field(default_factory=list)
    steps: list[bytes] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)

    def constant(self, value: bytes, name: str = "") -> None:
        """Add bytes that are the same in all messages."""
        if self.steps and self.steps[-1][0] == Kind.CONSTANT:
            self.strings[-1] += value
        else:
            self.add(Kind.CONSTANT, name, first=self.put([value]))

    def add(
        self,
        kind: Kind,
        name: str,
        column: Column | None = None,
        *,
        nullable: bool = False,
        limits: tuple[int, int] = (-(1 << 63), (1 << 64) - 1),
        first: int = 0,
        count: int = 0,
    ) -> None:
        """Add a step."""
        column = column or Column(0, np.dtype("u1"))
        is_number = column.dtype.kind != "V"
        width = column.dtype.itemsize if is_number or kind == Kind.TEXT else 1
        known_offset, mask = column.known if nullable or kind == Kind.CACHED else (0, 0)
        least, most = limits[0], min(limits[1], column.most)
        head = (kind, width, column.dtype.kind == "i", nullable, mask, column.utc)
        self.steps.append(_STEP.pack(*head, column.offset, known_offset, first, count, least, most, column.divisor))
        self.fields.append(name)

    def put(self, strings: Sequence[bytes]) -> int:
        """Append strings, and return the number of the first one."""
        self.strings += strings
        return len(self.strings) - len(strings)


def value_program(
    schema: Schema,
    header: bytes,
    columns: Mapping[str, Column],
    constants: Mapping[str, Any],
    cached: Mapping[str, Column],
) -> tuple[Program, list[tuple[str, ...]]]:
    """Return the program for a record behind `header`, and the runs of neighboring cached fields: the cache's parts.

    `cached` names the id of each cached field, and is null or its default for an unknown one. A field with no source
    gets its default. Raises SchemaError for a field that has none, or whose type does not fit its source.
    """
    if schema.get("type") != "record":
        raise SchemaError("the schema is not a record")
    program, parts = Program(), list[tuple[str, ...]]()
    program.constant(header)
    for names in _runs(schema["fields"], cached):
        name = names[0]["name"]
        if name in cached:
            default = program.put([encoded(names, {})])
            program.add(Kind.CACHED, name, cached[name], first=len(parts), count=default)
            parts.append(tuple(each["name"] for each in names))
        elif name in columns:
            kind, nullable = field_type(names[0])
            _add_column(program, names[0], columns[name], kind, nullable=nullable)
        elif name in constants or "default" in names[0]:
            program.constant(encoded(names, constants), name)
        else:
            raise SchemaError(f"no event carries the field {name}, and it has no default")
    return program, parts


def encoded(fields: Sequence[Schema], values: Mapping[str, Any]) -> bytes:
    """Return neighboring fields in Avro; those not in `values` get their defaults."""
    schema = {"type": "record", "name": "fields", "fields": list(fields)}
    names = [each["name"] for each in fields]
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, {name: values[name] for name in names if name in values})
    return out.getvalue()


def field_type(each: Schema) -> tuple[str, bool]:
    """Return a field's primitive type and whether it is nullable. Raises SchemaError for any other type."""
    kind, nullable = each["type"], False
    if isinstance(kind, list):
        if len(kind) != 2 or kind[0] != "null":
            raise SchemaError(f"field {each['name']}: unions other than [null, TYPE] are not supported")
        kind, nullable = kind[1], True
    if isinstance(kind, dict):
        kind = kind["type"]
    if kind not in _PRIMITIVES:
        raise SchemaError(f"field {each['name']}: type {kind} is not supported")
    return kind, nullable


def _runs(fields: Iterable[Schema], cached: Mapping[str, Column]) -> list[list[Schema]]:
    """Group neighboring cached fields; all others stay alone."""
    runs: list[list[Schema]] = []
    for each in fields:
        if runs and each["name"] in cached and runs[-1][-1]["name"] in cached:
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs


def _add_column(program: Program, each: Schema, column: Column, kind: str, *, nullable: bool) -> None:
    name = each["name"]
    is_bytes = column.dtype.subdtype is not None
    if kind == "string" and is_bytes:
        program.add(Kind.TEXT if column.is_text else Kind.ADDRESS, name, column, nullable=nullable)
    elif kind == "string" and column.names:
        plain = {"name": name, "type": "string"}
        names = [encoded([plain], {name: each}) for each in column.names]
        first = program.put(names)
        program.add(Kind.NAME, name, column, nullable=nullable, first=first, count=len(names))
    elif kind == "boolean" and not is_bytes:
        program.add(Kind.BOOLEAN, name, column, nullable=nullable)
    elif kind in _LIMITS and not is_bytes:
        program.add(Kind.INTEGER, name, column, nullable=nullable, limits=_LIMITS[kind])
    else:
        raise SchemaError(f"field {name}: type {kind} does not fit a column of {column.dtype}")
