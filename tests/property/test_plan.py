"""Programs for the native encoder give the bytes that fastavro writes, for every flat schema, row layout and value."""

import io
from collections.abc import Mapping
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import _native
from producer.encode.plan import Column, Schema, encoded, value_program
from producer.errors import SchemaError

LIMITS = {"int": (-(1 << 31), (1 << 31) - 1), "long": (-(1 << 63), (1 << 63) - 1)}
MAX_PARTS = 4
"""ENCODER_MAX_PARTS of native/encode.h."""
EDGES = sorted({sign * (1 << bits) + step for bits in range(64) for sign in (1, -1) for step in (-1, 0, 1)})
NAMES = ("Open", "", "Disorder", "n\u00e4me" * 50)
ID = Column(0, np.dtype("<u8"), known=(8, 1))
"""Each row begins with an id, and a byte of bits: the id's, and the one of all nullable fields."""


def encode_rows(schema: Schema, rows: Any, columns: Mapping[str, Column], **options: Any) -> list[bytes] | None:
    """Return the messages; None if a number does not fit."""
    program, parts = value_program(
        schema, options.get("header", b""), columns, options.get("constants", {}), options.get("cached", {})
    )
    native = _native.Encoder(b"".join(program.steps), b"", tuple(program.strings), rows.dtype.itemsize)
    fields = {field["name"]: field for field in schema["fields"]}
    for number, values in options.get("remembered", {}).items():
        native.remember(number, tuple(encoded([fields[name] for name in part], values) for part in parts))
    out, spans = np.empty(native.bound(len(rows)), np.uint8), np.empty((4, len(rows)), np.int64)
    if native.encode(rows, options.get("utc_offset", 0), out, spans) is None:
        return None
    return [out[start:][:length].tobytes() for start, length in zip(spans[0], spans[1], strict=True)]


def written_by_fastavro(schema: Schema, row: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, row)
    return out.getvalue()


def numbers(dtype: np.dtype[Any], kind: str) -> st.SearchStrategy[int]:
    limits = np.iinfo(dtype)
    least, most = LIMITS.get(kind, LIMITS["long"])
    low, high = max(int(limits.min), least), min(int(limits.max), most)
    return st.integers(low, high) | st.sampled_from([edge for edge in EDGES if low <= edge <= high])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Draw the fields of a schema, and for each the type of its member: a number's, or none for constants and ids."""
    fields, members = [], []
    for number in range(draw(st.integers(0, 12))):
        cached = [kind for kind, _ in members if kind == "cached"]
        more = ["cached"] if len(cached) < MAX_PARTS else []
        kind = draw(st.sampled_from(["int", "long", "boolean", "string", "constant", *more]))
        dtype = draw(st.sampled_from(["u1", "<u2", "<u4", "<u8"]))
        if kind in LIMITS:
            dtype = draw(st.sampled_from([dtype, "i1", "<i2", "<i4", "<i8"]))
        nullable = kind == "cached" or draw(st.booleans())
        avro = "string" if kind in ("constant", "cached") else kind
        fields.append({"name": f"f{number}", "type": ["null", avro] if nullable else avro})
        members.append((kind, dtype))
    return fields, members


@given(layouts(), st.binary(max_size=5), st.data())
def test_rows_are_encoded_as_fastavro_encodes_their_values(drawn: Any, header: bytes, data: st.DataObject) -> None:
    fields, members = drawn
    in_rows = {f["name"]: m for f, m in zip(fields, members, strict=True) if m[0] not in ("constant", "cached")}
    layout = np.dtype([("id", "<u8"), ("bits", "u1"), *((name, dtype) for name, (_, dtype) in in_rows.items())])
    columns = {
        name: Column(layout.fields[name][1], layout[name], (8, 2), NAMES if kind == "string" else ())
        for name, (kind, _) in in_rows.items()
    }
    constants = {
        f["name"]: data.draw(st.text(max_size=9)) for f, m in zip(fields, members, strict=True) if m[0] == "constant"
    }
    names = [f["name"] for f, m in zip(fields, members, strict=True) if m[0] == "cached"]
    remembered = {number: {name: data.draw(st.none() | st.text(max_size=300)) for name in names} for number in range(2)}
    rows = np.zeros(data.draw(st.integers(0, 9)), layout)
    expected = []
    for row in rows:
        row["id"], row["bits"] = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        values = dict(constants)
        values.update(remembered.get(int(row["id"]), {}) if row["bits"] & 1 else {})
        for field in fields:
            name = field["name"]
            if name in in_rows:
                kind = in_rows[name][0]
                row[name] = number = data.draw(numbers(layout[name], kind))
                value = (
                    NAMES[min(number, len(NAMES) - 1)]
                    if kind == "string"
                    else bool(number)
                    if kind == "boolean"
                    else number
                )
                values[name] = None if isinstance(field["type"], list) and not row["bits"] & 2 else value
        expected.append(header + written_by_fastavro({"type": "record", "name": "r", "fields": fields}, values))
    schema = {
        "type": "record",
        "name": "r",
        "fields": [{**f, "default": None} if f["name"] in names else f for f in fields],
    }
    assert (
        encode_rows(
            schema, rows, columns, header=header, constants=constants, remembered=remembered if names else {},
            cached=dict.fromkeys(names, ID),
        )
        == expected
    )  # fmt: skip


@given(
    st.lists(st.integers(-(1 << 60), 1 << 60), max_size=9), st.integers(-(1 << 62), 1 << 62), st.integers(1, 1 << 40)
)
def test_times_are_shifted_and_rounded_down(times: list[int], utc_offset: int, divisor: int) -> None:
    schema = {"type": "record", "name": "r", "fields": [{"name": "t", "type": "long"}]}
    rows = np.array([(each,) for each in times], [("t", "<i8")])
    column = Column(0, np.dtype("<i8"), utc=True, divisor=divisor)
    expected = [written_by_fastavro(schema, {"t": (each + utc_offset) // divisor}) for each in times]
    assert encode_rows(schema, rows, {"t": column}, utc_offset=utc_offset) == expected


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8", "i1", "<i2", "<i4", "<i8"])
@pytest.mark.parametrize("kind", ["int", "long"])
def test_numbers_beyond_the_type_are_not_encoded(kind: str, dtype: str) -> None:
    schema = {"type": "record", "name": "r", "fields": [{"name": "a", "type": kind}]}
    limits, (least, most) = np.iinfo(dtype), LIMITS[kind]
    for value in (limits.min, 0, limits.max, least - 1, least, most, most + 1):
        if limits.min <= value <= limits.max:
            expected = [written_by_fastavro(schema, {"a": int(value)})] if least <= value <= most else None
            rows = np.array([(value,)], [("a", dtype)])
            assert encode_rows(schema, rows, {"a": Column(0, np.dtype(dtype))}) == expected


@pytest.mark.parametrize("kind", [["string", "null"], ["null", "int", "long"], {"type": "map", "values": "int"}])
def test_a_type_that_is_not_supported_is_refused(kind: Any) -> None:
    with pytest.raises(SchemaError, match="field a"):
        value_program({"type": "record", "name": "r", "fields": [{"name": "a", "type": kind}]}, b"", {}, {}, {})


@pytest.mark.parametrize("kind", ["string", "bytes", "double"])
def test_a_number_in_a_field_of_another_type_is_refused(kind: str) -> None:
    schema = {"type": "record", "name": "r", "fields": [{"name": "a", "type": kind}]}
    with pytest.raises(SchemaError, match=r"field a: type .* does not fit a column of uint32"):
        value_program(schema, b"", {"a": Column(0, np.dtype("<u4"))}, {}, {})
