"""A columnar Avro encoder: takes numpy arrays and returns the bytes of all records.

It follows the record's schema and produces the same bytes as fastavro. It writes one field of all rows at once: the
field's bytes are computed as an array of 64-bit words, first byte lowest, and each word is stored at its row's offset.
Bytes of a word beyond the field's length are overwritten by the row's next field, or fall into the gap after the row.

Integers (zig-zag varints) and booleans are computed. Every other type, and every run of neighbouring fields that seldom
change, is a `Coded` column: fastavro encodes each distinct value once, and rows refer to it by number.

The format: https://avro.apache.org/docs/1.12.0/specification/#binary-encoding
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType

import fastavro
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from producer.errors import SchemaError

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Schema = Mapping[str, Any]
Group = NewType("Group", str)
"""The names of the neighbouring fields in one column, joined by commas."""

_WORD = 8
_GAP_BYTES = 2 * _WORD
_COMPUTED = frozenset({"int", "long", "boolean"})
_PRIMITIVES = _COMPUTED | {"string", "bytes", "float", "double", "null"}


class Table:
    """Distinct encoded values by number, in a matrix of bytes: value i is `matrix[i, :lengths[i]]`.

    Growing creates a new matrix, so the rows of a matrix that was handed out never change.
    """

    def __init__(self, values: Sequence[bytes] = ()) -> None:
        self._count = 0
        self.matrix: Bytes = np.zeros((16, _WORD), np.uint8)
        self.lengths: NDArray[np.int64] = np.zeros(16, np.int64)
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return self._count

    def add(self, value: bytes) -> int:
        """Append a value and return its number."""
        rows, width = self.matrix.shape
        if self._count == rows or len(value) > width:
            self._grow(rows * 2 if self._count == rows else rows, max(width, -(-len(value) // _WORD) * _WORD))
        self.matrix[self._count, : len(value)] = np.frombuffer(value, np.uint8)
        self.lengths[self._count] = len(value)
        self._count += 1
        return self._count - 1

    def _grow(self, rows: int, width: int) -> None:
        matrix, lengths = np.zeros((rows, width), np.uint8), np.zeros(rows, np.int64)
        matrix[: self._count, : self.matrix.shape[1]] = self.matrix[: self._count]
        lengths[: self._count] = self.lengths[: self._count]
        self.matrix, self.lengths = matrix, lengths


@dataclass(frozen=True, slots=True, eq=False)
class Ints:
    """A column of integers or booleans: any integer or bool dtype, shape (rows,).

    `valid` marks the rows that are not null; None means all. Only a nullable field may have it.
    """

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A column of indices into a table of encoded values; `codes` has an integer dtype and shape (rows,)."""

    codes: NDArray[Any]
    table: Table


Column = Ints | Coded


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Records in one buffer: record i is `buffer[starts[i]:][:lengths[i]]`; bytes between records are garbage."""

    buffer: Bytes
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """The schema of one column, which is Ints if `computed`, otherwise Coded."""

    group: Group
    nullable: bool
    computed: bool
    boolean: bool


class Encoder:
    """Encodes rows of one record schema, each preceded by the bytes of `header`.

    Fields named in `together` are not computed; neighbours among them form one group, filled by one Coded column.
    Raises SchemaError for a schema that is not a flat record of primitive types and ["null", primitive].
    """

    def __init__(self, schema: Schema, header: bytes = b"", together: frozenset[str] = frozenset()) -> None:
        if schema.get("type") != "record":
            raise SchemaError("the schema is not a record")
        self._fields = {field["name"]: field for field in schema["fields"]}
        self._header = np.frombuffer(header, np.uint8)
        self._steps: list[Step] = []
        for names in _neighbours(self._fields, together):
            kind, nullable = _kind(self._fields[names[0]])
            computed = kind in _COMPUTED and names[0] not in together
            self._steps.append(Step(Group(",".join(names)), nullable, computed, kind == "boolean"))
        for name in self._fields:
            _kind(self._fields[name])

    @property
    def groups(self) -> list[Group]:
        """The columns that `encode` takes, in the record's order."""
        return [step.group for step in self._steps]

    def step(self, group: Group) -> Step:
        """Return a column's schema."""
        return next(step for step in self._steps if step.group == group)

    def value(self, group: Group, values: Mapping[str, Any]) -> bytes:
        """Encode one value of a group for a Coded column's table; fields not in `values` get their defaults."""
        names = group.split(",")
        schema = {"type": "record", "name": "group", "fields": [self._fields[name] for name in names]}
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema, {name: values[name] for name in names if name in values})
        return out.getvalue()

    def encode(self, columns: Mapping[Group, Column], rows: int) -> Encoded:
        """Encode `rows` records. Raises KeyError for a missing column."""
        parts = _packed(part for step in self._steps for part in _parts(step, columns[step.group]))
        stride = len(self._header) + sum(part.width for part in parts) + _GAP_BYTES
        buffer = np.empty(rows * stride, np.uint8)
        starts = np.arange(rows, dtype=np.int64) * stride
        buffer.reshape(rows, stride)[:, : len(self._header)] = self._header
        ends = starts + len(self._header)
        for part in parts:
            _store(part.chunks, buffer, ends)
            ends += part.lengths
        return Encoded(buffer, starts, ends - starts)


def _neighbours(names: Mapping[str, Any], together: frozenset[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in names:
        if groups and name in together and groups[-1][-1] in together:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _kind(field: Mapping[str, Any]) -> tuple[str, bool]:
    """Return a field's primitive type and whether it is nullable."""
    kind, nullable = field["type"], False
    if isinstance(kind, list):
        if len(kind) != 2 or kind[0] != "null":
            raise SchemaError(f"field {field['name']}: unions other than [null, TYPE] are not supported")
        kind, nullable = kind[1], True
    if isinstance(kind, dict):
        kind = kind["type"]
    if kind not in _PRIMITIVES:
        raise SchemaError(f"field {field['name']}: type {kind} is not supported")
    return kind, nullable


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The bytes of one column: the first `lengths` of each row's chunk (an int if all are equal), at most `width`."""

    chunks: NDArray[Any]
    lengths: NDArray[np.int64] | int
    width: int


def _store(chunks: NDArray[Any], buffer: Bytes, offsets: NDArray[np.int64]) -> None:
    """Write each row's chunk at its offset, through a view whose elements start at every byte of the buffer."""
    size = chunks.dtype.itemsize
    if len(buffer) >= size:
        places = as_strided(buffer[:size].view(chunks.dtype), (len(buffer) - size + 1,), (1,))
        places[offsets] = chunks


def _packed(parts: Iterable[_Part]) -> list[_Part]:
    """Merge neighbours that fit in one word, to store fewer words."""
    packed: list[_Part] = []
    for part in parts:
        last = packed[-1] if packed else None
        if last and last.chunks.dtype == part.chunks.dtype == np.uint64 and last.width + part.width <= _WORD:
            shifted = part.chunks << np.asarray(last.lengths * 8).astype(np.uint64)
            packed[-1] = _Part(last.chunks | shifted, last.lengths + part.lengths, last.width + part.width)
        else:
            packed.append(part)
    return packed


def _parts(step: Step, column: Column) -> list[_Part]:
    if isinstance(column, Coded):
        width = column.table.matrix.shape[1]
        chunks = column.table.matrix.view(f"V{width}")[:, 0].take(column.codes)
        return [_Part(chunks, column.table.lengths.take(column.codes), width)]
    values, valid = _zigzag(column.values), column.valid
    if valid is not None:
        values = np.where(valid, values, _ZERO)
    if not step.nullable:
        return _varint(values)
    first, *rest = _varint(values)
    if rest or first.width == _WORD:
        branch = _Part(np.full(len(values), _NOT_NULL, np.uint64), 1, 1)
        return [_nulled(branch, valid, 1), *(_nulled(part, valid, 0) for part in (first, *rest))]
    return [_nulled(_Part(first.chunks << _BYTE | _NOT_NULL, first.lengths + 1, first.width + 1), valid, 1)]


def _nulled(part: _Part, valid: NDArray[np.bool_] | None, null_bytes: int) -> _Part:
    """Replace rows that are null by `null_bytes` zeros: null is branch 0 of the union."""
    if valid is None:
        return part
    return _Part(np.where(valid, part.chunks, _ZERO), np.where(valid, part.lengths, null_bytes), part.width)


def _zigzag(values: NDArray[Any]) -> Words:
    """Zig-zag integers for Avro's varints; a boolean is one byte, which is its own varint."""
    if values.dtype.kind == "b":
        return values.astype(np.uint64)
    if values.dtype.kind == "u":
        return values.astype(np.uint64) << _ONE
    wide = values.astype(np.int64)
    return (wide << 1 ^ wide >> 63).view(np.uint64)


_ZERO, _ONE, _BYTE, _NOT_NULL = np.uint64(0), np.uint64(1), np.uint64(8), np.uint64(2)
_SEVENTH = [np.uint64(0x7F << 7 * k) for k in range(_WORD)]
_SHIFT = [np.uint64(k) for k in range(_WORD)]
_BELOW = [np.uint64(1 << 7 * k) for k in range(10)]
# By a varint's length: the continuation bits of its first word (every byte except the last), and of its second.
_MORE = np.array([sum(0x80 << 8 * k for k in range(min(length - 1, 8))) for length in range(11)], np.uint64)
_MORE_HIGH = np.array([0] * 10 + [0x80], np.uint64)


def _varint(values: Words) -> list[_Part]:
    """Seven bits per byte, lowest first: one word if all values fit in 56 bits, else two."""
    most = -(-int(values.max(initial=1)).bit_length() // 7)
    if most == 1:
        return [_Part(values, 1, 1)]
    low = values & _SEVENTH[0]
    for k in range(1, min(most, _WORD)):
        low |= (values & _SEVENTH[k]) << _SHIFT[k]
    lengths = np.ones(len(values), np.int64)
    for k in range(1, most):
        lengths += values >= _BELOW[k]
    low |= _MORE.take(lengths)
    if most <= _WORD:
        return [_Part(low, lengths, most)]
    rest = values >> np.uint64(56)
    high = rest & np.uint64(0x7F) | (rest & np.uint64(0x80)) << _ONE | _MORE_HIGH.take(lengths)
    return [_Part(low, np.minimum(lengths, _WORD), _WORD), _Part(high, np.maximum(lengths - _WORD, 0), most - _WORD)]
