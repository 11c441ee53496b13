"""Decoded events as Arrow record batches. Texts are dictionaries, so no Python runs for each event."""

from typing import Any

import numpy as np
import pyarrow as pa

from producer.consume.columns import Table, text_to_map
from producer.events import Ints, Mask, Stream
from producer.schemas import load_schema

_TYPES = {
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float64(),
    "double": pa.float64(),
    "string": pa.dictionary(pa.int32(), pa.string()),
}
_MAP = pa.map_(pa.string(), pa.string())
_TIME = pa.timestamp("ms", tz="UTC")


def schema_of(stream: Stream, names: frozenset[str] | None = None, *, maps_as_text: bool = False) -> Any:
    """Return the Arrow schema of a stream's events: all fields but lists, or those in `names`.

    With `maps_as_text`, maps are JSON objects.
    """
    fields = []
    for field in load_schema(stream.schema_file)["fields"]:
        kind, nullable = field["type"], isinstance(field["type"], list)
        if nullable:
            kind = next(each for each in kind if each != "null")
        if isinstance(kind, dict) and kind.get("logicalType") == "timestamp-millis":
            arrow = _TIME
        elif isinstance(kind, dict) and kind["type"] == "map":
            arrow = _TYPES["string"] if maps_as_text else _MAP
        elif isinstance(kind, str):
            arrow = _TYPES[kind]
        else:
            continue
        if names is None or field["name"] in names:
            metadata = {"doc": field["doc"]} if "doc" in field else None
            fields.append(pa.field(field["name"], arrow, nullable=nullable or "default" in field, metadata=metadata))
    return pa.schema(fields)


def batch_of(schema: Any, table: Table, chosen: Mask) -> Any:
    """Return the chosen rows as a record batch of `schema`; fields that the table lacks are null."""
    columns = {name: column for column, name in enumerate(table.plan.names)}
    size = int(np.count_nonzero(chosen))
    everything = size == len(chosen)
    arrays = []
    for field in schema:
        column = columns.get(field.name)
        if column is None:
            arrays.append(pa.nulls(size, field.type))
            continue
        cells, valid = table.cells[column], table.valid[column]
        if not everything:
            cells, valid = cells[chosen], valid[chosen]
        arrays.append(_array(field.type, cells, valid, table.texts))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(kind: Any, cells: Ints, valid: Mask, texts: list[str]) -> Any:
    if not valid.any():  # of most hosts, some fields are always null: no container, no pod
        return pa.nulls(len(cells), kind)
    mask = None if valid.all() else ~valid
    if pa.types.is_dictionary(kind):
        return _texts(cells, valid, mask, texts)
    if kind == _MAP:
        return _maps(cells, mask, texts)
    if pa.types.is_boolean(kind):
        return pa.array(cells != 0, mask=mask)
    if pa.types.is_floating(kind):
        return pa.array(cells.view(np.float64), mask=mask)
    numbers = pa.array(cells, mask=mask)
    return numbers if kind == pa.int64() else numbers.cast(kind)


def _maps(cells: Ints, mask: Mask | None, texts: list[str]) -> Any:
    """Return maps; a batch has few different ones."""
    used, indexes = np.unique(cells if mask is None else np.where(mask, -1, cells), return_inverse=True)
    distinct = [None if at < 0 else list(text_to_map(texts[at]).items()) for at in used.tolist()]
    return pa.array(distinct, _MAP).take(pa.array(indexes))


def _texts(cells: Ints, valid: Mask, mask: Mask | None, texts: list[str]) -> Any:
    """Return texts as a dictionary of those that the column has."""
    used = np.zeros(len(texts) + 1, np.bool_)
    used[np.where(valid, cells, len(texts)) if mask is not None else cells] = True
    used = used[:-1]
    numbers = np.cumsum(used, dtype=np.int32) - 1
    if not len(numbers):
        numbers = np.zeros(1, np.int32)
    indexes = numbers[np.where(valid, cells, 0) if mask is not None else cells]
    values = [texts[at] for at in np.flatnonzero(used).tolist()]
    return pa.DictionaryArray.from_arrays(pa.array(indexes, pa.int32(), mask=mask), pa.array(values, pa.string()))
