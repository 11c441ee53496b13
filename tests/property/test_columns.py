"""The native decoder reads what fastavro writes, by any version of our schemas, and nothing that fastavro does not."""

import io
import json
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.consume.columns import decode, groups
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.plan import Fields, plan_for_all
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
    ("labels", "map?"),
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
    """Return the names of the fields that are neither lists nor bytes."""
    plain = [(field["name"], field["type"]) for field in schema["fields"]]
    return [
        name
        for name, kind in plain
        if kind == MAP or (next(each for each in kind if each != "null") if isinstance(kind, list) else kind) in SCALARS
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
            _value(kind, cell, columns.texts) if has else None
            for cell, has in zip(columns[name].tolist(), valid, strict=True)
        ]
        assert cells == [record.get(name) for record in written]


def _value(kind: str, cell: int, texts: list[str]) -> Any:
    if kind.startswith("map"):
        return json.loads(texts[cell])
    return texts[cell] if kind.startswith("string") else cell


def written_map(pairs: Sequence[tuple[str, str]], blocks: Sequence[int]) -> bytes:
    """Return a map in blocks of these many pairs, the negative ones with their size."""
    out, rest = b"", list(pairs)
    for count in blocks:
        some, rest = rest[: abs(count)], rest[abs(count) :]
        content = b"".join(_long(len(text.encode())) + text.encode() for pair in some for text in pair)
        out += _long(count) + (_long(len(content)) if count < 0 else b"") + content
    return out + _long(0)


def _long(number: int) -> bytes:
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, "long", number)
    return buffer.getvalue()


ONE_MAP = {**OURS, "fields": [{"name": "labels", "type": MAP}]}
PAIRS = [("env", "prod"), ("dc", "fra"), ("\u00e9", '"\\'), ("", "")]


@given(st.permutations(PAIRS), st.permutations([1, -1, 2]), st.integers(1, 3))
def test_equal_maps_are_one_text_however_they_are_written(
    pairs: list[tuple[str, str]], blocks: list[int], copies: int
) -> None:
    usual = bytes(5) + written_map(PAIRS, [4])
    other = bytes(5) + written_map([("env", "before"), *pairs], [1, *blocks])
    found = decode([usual, *[other] * copies, usual], plan_for_all(ONE_MAP))
    assert found.status.tolist() == [0] * (copies + 2)
    assert found.cells.tolist() == [[0] * (copies + 2)]
    assert found.texts == [json.dumps(dict(PAIRS), ensure_ascii=False, sort_keys=True, separators=(",", ":"))]


def test_a_map_and_a_string_with_the_same_text_are_one_text() -> None:
    schema = {**OURS, "fields": [{"name": "a", "type": "string"}, {"name": "b", "type": MAP}]}
    value = bytes(5) + _long(7) + b'{"a":1}' + written_map([], [])
    text = bytes(5) + _long(2) + b"{}" + written_map([], [])
    found = decode([value, text], plan_for_all(schema))
    assert (found.texts, found.cells.tolist()) == (['{"a":1}', "{}"], [[0, 1], [1, 1]])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (written_map([(str(at), "x") for at in range(64)], [64]), 0),
        (written_map([(str(at), "x") for at in range(65)], [65]), 3),
        (written_map([(str(at), "x") for at in range(65)], [1] * 65), 3),
        (written_map([("a", "x" * 4096)], [1]), 0),
        (written_map([("a", "x" * 4097)], [1]), 2),
        (written_map([("a", "b")], [1])[:-1], 1),
        (_long(1) + _long(1) + b"\xff" + _long(0) + _long(0), 1),
        (_long(-(1 << 63)) + _long(0), 1),
        (_long(1 << 40), 1),
    ],
)
def test_maps_are_bounded_and_valid(body: bytes, status: int) -> None:
    good = bytes(5) + written_map(PAIRS, [4])
    found = decode([good, bytes(5) + body, good], plan_for_all(ONE_MAP))
    assert found.status.tolist() == [0, status, 0]
    assert found.cells[0, 0] == found.cells[0, 2]


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


def _ordered(field: Any) -> Any:
    return dict(sorted(field.items())) if isinstance(field, dict) else field


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
    # Not ==, for NaN; the keys of maps are in order.
    assert repr(found) == repr({name: _ordered(expected[name]) for name in columns_in(schema)})


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, -1, 1 << 62])), max_size=40))
def test_groups_are_numbered_in_order_of_appearance(rows: list[tuple[int, int]]) -> None:
    columns = np.array(rows, np.int64).reshape(len(rows), 2).T
    ids, firsts = groups(*columns)
    distinct = list(dict.fromkeys(rows))
    assert ids.tolist() == [distinct.index(row) for row in rows]
    assert firsts.tolist() == [rows.index(row) for row in distinct]
