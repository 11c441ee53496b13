"""Parquet files of events, as `rebpf export` and other tools write them: as Arrow, and as the parts of other files."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from producer.consume.columns import Table, map_to_text
from producer.consume.plan import TEXTS, Plan
from producer.errors import IncompleteError, UnavailableError
from producer.events import Ints
from producer.export.arrow import schema_of
from producer.export.container import plan_of
from producer.export.part import Part
from producer.export.sources import Names
from producer.schemas import load_schema
from producer.view.records import stream_of

_ROWS = 10_000


def open_parquet(files: Sequence[Path], schema: Any) -> Any:
    """Return files as a dataset of `schema`. Columns that a file lacks are null, texts are dictionaries."""
    texts = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    options = pyarrow.dataset.ParquetReadOptions(dictionary_columns=texts)
    form = pyarrow.dataset.ParquetFileFormat(read_options=options)
    return pyarrow.dataset.dataset(list(map(str, files)), schema, format=form)


def read_parquet(path: Path, names: Names) -> Iterator[Part]:
    """Yield the events of a file, with the fields `names` of its stream, or all.

    Raises UnavailableError if it cannot be opened or has no events of ours, IncompleteError if it is damaged.
    """
    with _translated(path):
        stream = stream_of(pyarrow.parquet.read_schema(path).names)
        if stream is None:
            raise UnavailableError(f"{path}: has no events of ReBPF")
        plan = plan_of(json.dumps(load_schema(stream.schema_file)), names.get(stream))
        for batch in open_parquet([path], schema_of(stream, frozenset(plan.names))).to_batches(batch_size=_ROWS):
            yield Part(stream, _table(batch, plan))


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise IncompleteError(f"{path}: damaged, or not Parquet with the types of our events: {error}") from error


def _table(batch: Any, plan: Plan) -> Table:
    shape = len(plan.names), len(batch)
    cells, valid = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    texts: dict[str, int] = {}
    for at, (name, kind) in enumerate(zip(plan.names, plan.types, strict=True)):
        column = batch.column(name)
        valid[at] = column.is_valid().to_numpy(zero_copy_only=False)
        if valid[at].any():
            cells[at] = _indexes(column, texts) if kind in TEXTS else column.cast(pa.int64()).fill_null(0).to_numpy()
    hashes = np.array(list(map(hash, texts)), np.int64)
    return Table(plan, cells, valid, np.zeros(len(batch), np.uint8), list(texts), hashes)


def _indexes(column: Any, texts: dict[str, int]) -> Ints:
    """Return a column's texts, or those of its maps, as indexes in `texts`, to which new ones are added."""
    if pa.types.is_map(column.type):
        maps = [None if each is None else map_to_text(dict(each)) for each in column.to_pylist()]
        column = pa.array(maps, pa.string()).dictionary_encode()
    own = [texts.setdefault(text or "", len(texts)) for text in column.dictionary.to_pylist()]
    indexes: Ints = np.array(own, np.int64)[column.indices.fill_null(0).to_numpy()]
    return indexes
