"""The column encoder writes the bytes that fastavro writes, for every flat schema and every value."""

import io
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.encode.avro import Coded, Encoder, Group, Ints, Table
from producer.errors import SchemaError

INTEGERS = {"int": (-(2**31), 2**31 - 1), "long": (-(2**63), 2**63 - 1)}
EDGES = sorted({sign * (1 << bits) + step for bits in range(63) for sign in (1, -1) for step in (-1, 0, 1)})


def values_of(kind: str) -> st.SearchStrategy[Any]:
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        return st.text(max_size=40)
    low, high = INTEGERS[kind]
    return st.integers(low, high) | st.sampled_from([edge for edge in EDGES if low <= edge <= high])


@st.composite
def records(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw the fields of a record schema, and rows of it."""
    kinds = draw(st.lists(st.tuples(st.sampled_from(["int", "long", "boolean", "string"]), st.booleans()), max_size=12))
    fields: list[dict[str, Any]] = []
    values: dict[str, st.SearchStrategy[Any]] = {}
    for number, (kind, nullable) in enumerate(kinds):
        name = f"f{number}"
        fields.append({"name": name, "type": ["null", kind] if nullable else kind})
        values[name] = st.none() | values_of(kind) if nullable else values_of(kind)
    return fields, draw(st.lists(st.fixed_dictionaries(values), max_size=12))


def written_by_fastavro(schema: dict[str, Any], row: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, row)
    return out.getvalue()


def column(encoder: Encoder, group: Group, rows: list[dict[str, Any]]) -> Ints | Coded:
    if not encoder.step(group).computed:
        return Coded(np.arange(len(rows)), Table([encoder.value(group, row) for row in rows]))
    values = [row[group] for row in rows]
    valid = np.array([value is not None for value in values], bool)
    dtype = bool if all(isinstance(value, bool) for value in values if value is not None) and values else np.int64
    return Ints(np.array([value or 0 for value in values], dtype), None if valid.all() else valid)


def written_by_columns(encoder: Encoder, rows: list[dict[str, Any]]) -> list[bytes]:
    encoded = encoder.encode({group: column(encoder, group, rows) for group in encoder.groups}, len(rows))
    return [
        encoded.buffer[start : start + length].tobytes()
        for start, length in zip(encoded.starts, encoded.lengths, strict=True)
    ]


@given(records(), st.binary(max_size=5))
def test_columns_are_encoded_as_fastavro_encodes_rows(drawn: Any, header: bytes) -> None:
    fields, rows = drawn
    schema = {"type": "record", "name": "r", "fields": fields}
    expected = [header + written_by_fastavro(schema, row) for row in rows]
    assert written_by_columns(Encoder(schema, header), rows) == expected


@given(records(), st.sets(st.integers(0, 11)))
def test_fields_that_stay_together_are_encoded_as_if_they_were_apart(drawn: Any, chosen: set[int]) -> None:
    fields, rows = drawn
    schema = {"type": "record", "name": "r", "fields": fields}
    encoder = Encoder(schema, together=frozenset(f"f{number}" for number in chosen))
    assert written_by_columns(encoder, rows) == [written_by_fastavro(schema, row) for row in rows]


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "i8"])
def test_every_integer_dtype_keeps_its_extremes(dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = np.array([limits.min, 0, 1, limits.max], dtype)
    schema = {"type": "record", "name": "r", "fields": [{"name": "a", "type": "long"}]}
    encoded = Encoder(schema).encode({Group("a"): Ints(values)}, len(values))
    for start, length, value in zip(encoded.starts, encoded.lengths, values, strict=True):
        message = encoded.buffer[start : start + length].tobytes()
        assert message == written_by_fastavro(schema, {"a": int(value)})


@pytest.mark.parametrize("kind", [["string", "null"], ["null", "int", "long"], {"type": "map", "values": "int"}])
def test_a_type_that_is_not_supported_is_refused(kind: Any) -> None:
    with pytest.raises(SchemaError, match="field a"):
        Encoder({"type": "record", "name": "r", "fields": [{"name": "a", "type": kind}]})
