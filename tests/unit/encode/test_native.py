"""producer._native.Encoder checks what Python passes to it: programs, rows and buffers."""

import ctypes
from typing import Any

import numpy as np
import pytest

from producer import _native
from producer.encode.plan import Column, Kind, Program


class Row(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint64),)


def encoder(row_size: int = 8) -> _native.Encoder:
    program = Program()
    program.add(Kind.INTEGER, "number", Column(0, np.dtype("<u8")), limits=(-(1 << 63), (1 << 63) - 1))
    return _native.Encoder(program.steps[0], b"", (), row_size)


def test_rows_may_be_any_buffer_of_one_dimension() -> None:
    native, out, spans = encoder(), bytearray(30), bytearray(4 * 3 * 8)
    rows = (Row * 3)(Row(0), Row(1), Row(2))  # ctypes reports no strides
    assert native.encode(rows, 0, out, spans) == 3
    assert out[:3] == b"\x00\x02\x04"
    assert native.encode(np.arange(9, dtype="<u8")[::-4], 0, out, spans) == 3
    assert out[:3] == b"\x10\x08\x00"


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 2), "<u8"), np.zeros(2, "<u4"), np.zeros((), "<u8"), b"12345678"], ids=lambda rows: str(rows)
)
def test_rows_of_another_shape_are_an_error(rows: Any) -> None:
    for call in (encoder().missing, lambda rows: encoder().encode(rows, 0, bytearray(99), bytearray(64))):
        with pytest.raises(ValueError, match="rows: one dimension of 8 bytes expected"):
            call(rows)


def test_buffers_that_are_too_small_are_errors() -> None:
    rows = np.zeros(3, "<u8")
    with pytest.raises(ValueError, match="29 bytes for 3 rows, but they may need 30"):
        encoder().encode(rows, 0, bytearray(29), bytearray(96))
    with pytest.raises(ValueError, match="spans: 88 bytes for 3 rows"):
        encoder().encode(rows, 0, bytearray(30), bytearray(88))
    with pytest.raises(BufferError):
        encoder().encode(rows, 0, bytes(30), bytearray(96))


def test_programs_that_are_not_whole_are_errors() -> None:
    with pytest.raises(ValueError, match="reads outside the row"):
        encoder(7)
    with pytest.raises(ValueError, match="a step has 48 bytes"):
        _native.Encoder(b"x", b"", (), 8)
    with pytest.raises(TypeError):
        _native.Encoder(b"", b"", ("text",), 8)  # type: ignore[arg-type]
    for size, reason in ((16, "reads outside the row"), (17, "longer than 16 bytes")):
        program = Program()
        program.add(Kind.TEXT, "", Column(0, np.dtype(("u1", size)), is_text=True))
        with pytest.raises(ValueError, match=reason):
            _native.Encoder(b"".join(program.steps), b"", (), size - 1)


def test_ids_and_parts_out_of_range_are_errors() -> None:
    with pytest.raises(OverflowError):
        encoder().remember(1 << 64, ())
    with pytest.raises(TypeError):
        encoder().remember(1, (None,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 parts"):
        encoder().remember(1, (b"",) * 5)


def caching() -> _native.Encoder:
    """Return an encoder of rows that are ids."""
    program = Program()
    program.add(Kind.CACHED, "id", Column(0, np.dtype("<u8")), count=program.put([b"\0"]))
    return _native.Encoder(program.steps[0], b"", tuple(program.strings), 8)


@pytest.mark.parametrize(("most", "size"), [(_native.MAX_IDS, 1), (8, 1 << 20)], ids=["ids", "8 MiB"])
def test_what_is_remembered_is_bounded(most: int, size: int) -> None:
    native = caching()
    for number in range(most):
        native.remember(number, (bytes(size),))
    assert native.missing(np.arange(most, dtype="<u8")) is None
    native.remember(most, (b"x",))
    assert native.missing(np.arange(8, dtype="<u8")) == [*range(8)]
    assert native.missing(np.array([most], "<u8")) is None


def test_an_id_that_is_remembered_again_takes_its_room_once() -> None:
    native = caching()
    for number in (0, *[1] * 20):
        native.remember(number, (bytes(1 << 20),))
    assert native.missing(np.arange(2, dtype="<u8")) is None
