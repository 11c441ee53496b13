"""The native decoder reads what fastavro writes, by any version of our schemas, and nothing that fastavro does not."""

import io
import json
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import fastavro
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.consume.columns import groups
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.plan import Fields
from producer.events import SchemaId
from producer.paths import SCHEMAS

ID = SchemaId(9)
WANTED: Fields = (
    ("ts_ns", "long"),
    ("host", "string"),
    ("unit", "string?"),
    ("cpu", "long"),
    ("srtt_us", "long?"),
    ("saddr", "string"),
    ("of a later version", "string?"),
)
OURS = json.loads((SCHEMAS / "tcp_transmit.avsc").read_text())
SCALARS = ("boolean", "int", "long", "float", "double", "string")
LISTS = ("long", "string", "bytes")
MAP = {"type": "map", "values": "string"}

types: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from((*SCALARS, "bytes")),
    st.sampled_from(SCALARS).flatmap(lambda kind: st.sampled_from([["null", kind], [kind, "null"]])),
    st.sampled_from(LISTS).map(lambda items: {"type": "array", "items": items}),
    st.just(MAP),
)


def unlogical(kind: Any) -> Any:
    return kind["type"] if isinstance(kind, dict) and "logicalType" in kind else kind


FIELDS = [{"name": field["name"], "type": unlogical(field["type"])} for field in OURS["fields"]]
EXAMPLES: dict[str, Any] = {"string": "text", str(MAP): {"dc": "fra-1"}}
BASE = {
    field["name"]: None if isinstance(field["type"], list) else EXAMPLES.get(str(field["type"]), 7) for field in FIELDS
}


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    """Our fields in any order, with unknown ones between them."""
    fields = [*FIELDS, *({"name": f"x{at}", "type": kind} for at, kind in enumerate(draw(st.lists(types, max_size=5))))]
    random.Random(draw(st.integers(0, 1 << 32))).shuffle(fields)
    return {**OURS, "fields": fields}


def values(kind: Any) -> st.SearchStrategy[Any]:
    if isinstance(kind, list):
        return st.none() | values(next(each for each in kind if each != "null"))
    if kind == MAP:
        return st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3)
    if isinstance(kind, dict):
        return st.lists(values(kind["items"]), max_size=3)
    by_type: dict[str, st.SearchStrategy[Any]] = {
        "boolean": st.booleans(),
        "int": st.integers(-(1 << 31), (1 << 31) - 1),
        "long": st.integers(-(1 << 63), (1 << 63) - 1),
        "float": st.floats(width=32, allow_nan=False),
        "double": st.floats(allow_nan=False),
        "bytes": st.binary(max_size=9),
        "string": st.text(max_size=12) | st.sampled_from(["web-1", "web-2"]),
    }
    return by_type[kind]


def framed(schema: Any, record: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), record)
    return struct.pack(">bI", 0, ID) + buffer.getvalue()


def columns_in(schema: Any) -> list[str]:
    """Return the names of the fields that are neither lists nor maps nor bytes."""
    plain = [(field["name"], field["type"]) for field in schema["fields"]]
    return [
        name
        for name, kind in plain
        if (next(each for each in kind if each != "null") if isinstance(kind, list) else kind) in SCALARS
    ]


def records(schema: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return records in which the unknown fields and some of ours have any values."""
    of_field = {field["name"]: values(field["type"]) for field in schema["fields"]}
    unknown = {name: of_field[name] for name in of_field if name.startswith("x")}
    some = st.sampled_from([field["name"] for field in FIELDS]).flatmap(
        lambda name: st.tuples(st.just(name), of_field[name])
    )
    return st.tuples(st.fixed_dictionaries(unknown), st.lists(some, max_size=6)).map(
        lambda drawn: {**BASE, **drawn[0], **dict(drawn[1])}
    )


cases = schemas().flatmap(lambda schema: st.tuples(st.just(schema), st.lists(records(schema), min_size=1, max_size=3)))
few = settings(max_examples=40, deadline=None)


@few
@given(cases)
def test_records_are_those_that_fastavro_wrote(case: tuple[Any, list[dict[str, Any]]]) -> None:
    schema, written = case
    names = columns_in(schema)
    found = Decoder(None, {ID: schema}).records([framed(schema, record) for record in written])
    assert found == [{name: record[name] for name in names} for record in written]


@few
@given(cases)
def test_columns_are_those_of_the_records(case: tuple[Any, list[dict[str, Any]]]) -> None:
    schema, written = case
    batch: list[bytes | None] = [framed(schema, record) for record in written]
    columns, rejected = Decoder(None, {ID: schema}).columns([None, *batch, b"x"], WANTED)
    assert [row for row, _ in rejected] == [0, len(batch) + 1]
    assert columns.rows.tolist() == list(range(1, len(batch) + 1))
    for name, kind in WANTED:
        valid = columns.valid.get(name, np.ones(len(columns), np.bool_)).tolist()
        cells = [
            (columns.texts[cell] if kind.startswith("string") else cell) if has else None
            for cell, has in zip(columns[name].tolist(), valid, strict=True)
        ]
        assert cells == [record.get(name) for record in written]


def test_columns_of_two_versions_are_one_batch() -> None:
    before = {**OURS, "fields": [field for field in FIELDS if field["name"] != "unit"]}
    versions = {ID: {**OURS, "fields": FIELDS}, SchemaId(8): before}
    batch: list[bytes | None] = []
    for number, unit in ((ID, "a"), (SchemaId(8), None), (ID, None), (ID, "b")):
        value = framed(versions[number], {**BASE, "unit": unit, "host": f"host of {unit}"})
        batch.append(value[:1] + struct.pack(">I", number) + value[5:])
    columns, rejected = Decoder(None, versions).columns(batch, WANTED)
    assert rejected == []
    found = zip(columns["host"].tolist(), columns["unit"].tolist(), columns.valid["unit"].tolist(), strict=True)
    assert [(columns.texts[host], columns.texts[unit] if valid else None) for host, unit, valid in found] == [
        ("host of a", "a"),
        ("host of None", None),
        ("host of None", None),
        ("host of b", "b"),
    ]


changes = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "insert"]), st.integers(0, 255)), min_size=1, max_size=4
)


@few
@given(cases, changes)
def test_a_changed_message_is_refused_or_read_as_fastavro_reads_it(
    case: tuple[Any, list[dict[str, Any]]], made: Sequence[tuple[float, str, int]]
) -> None:
    schema, (record, *_) = case
    value = framed(schema, record)
    body = bytearray(value[5:])
    for where, how, byte in made:
        at = int(where * len(body))
        body[at : at + (how != "insert")] = b"" if how == "cut" else bytes([byte])
    (found,) = Decoder(None, {ID: schema}).records([value[:5] + bytes(body)])
    if isinstance(found, UndecodableError):
        return
    expected: Any = fastavro.schemaless_reader(io.BytesIO(body), fastavro.parse_schema(schema), None)
    # Not ==, for NaN.
    assert repr(found) == repr({name: expected[name] for name in columns_in(schema)})


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, -1, 1 << 62])), max_size=40))
def test_groups_are_numbered_in_order_of_appearance(rows: list[tuple[int, int]]) -> None:
    columns = np.array(rows, np.int64).reshape(len(rows), 2).T
    ids, firsts = groups(*columns)
    distinct = list(dict.fromkeys(rows))
    assert ids.tolist() == [distinct.index(row) for row in rows]
    assert firsts.tolist() == [rows.index(row) for row in distinct]
