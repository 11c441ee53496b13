"""Writes events as Parquet or CSV files, partitioned by day: FOLDER/tcp_flow/date=2026-11-29/NAME.parquet.

Files appear when they are complete. A file of the same name is replaced, so the same export can be
repeated, and one of each hour or day adds to the same folder.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from producer.errors import UnavailableError
from producer.events import Stream
from producer.host.output_file import create, partial_of

_ROWS = 1 << 17
"""Rows of a row group."""
_MOST_ROWS = 4 * _ROWS
"""Rows in memory: of many days, each has some."""
_CSV = pyarrow.csv.WriteOptions(batch_size=1 << 14)
"""Small batches cost more for each column: 16,384 rows take 60 % of the time of 1,024."""
_DAY_NS = 86_400_000_000_000
_MOST_FILES = 1000
"""A topic has some days; one of foreign events with any time must not open a file for each."""


@dataclass
class _Part:
    """A file that is being written, and the batches that are not in it yet."""

    path: Path
    file: BinaryIO | None = None
    writer: Any = None
    batches: list[Any] = field(default_factory=list)
    rows: int = 0
    written: int = 0

    @property
    def partial(self) -> Path:
        return partial_of(self.path)

    def close(self) -> None:
        """Close the file, once."""
        file, writer, self.file, self.writer = self.file, self.writer, None, None
        with file or nullcontext():
            try:
                if writer is not None:
                    writer.close()
            finally:
                if isinstance(writer, pyarrow.parquet.ParquetWriter):
                    writer.is_open = False  # after an error, its destructor would try again, and log the error


class Dataset:
    """The files of an export: one for each stream and day. Use it as a context; `commit` gives them their names."""

    def __init__(self, folder: Path, name: str, form: str) -> None:
        self._folder = folder
        self._name = f"{name}.{form}"
        self._is_csv = form == "csv"
        self._parts: dict[tuple[Stream, int], _Part] = {}
        self._rows = 0  # of all parts, not written yet

    def __enter__(self) -> "Dataset":
        return self

    def __exit__(self, *_: object) -> None:
        """Delete what was not committed."""
        for part in self._parts.values():
            with suppress(OSError):
                part.close()
            with suppress(OSError):
                part.partial.unlink(missing_ok=True)
        self._parts.clear()

    def add(self, stream: Stream, batch: Any) -> None:
        """Write a record batch. Raises UnavailableError if the disk is full."""
        days = batch.column("ts_ns").to_numpy() // _DAY_NS
        for day in np.unique(days).tolist():
            rows = batch if (days == day).all() else batch.filter(pa.array(days == day))
            with disk_errors(self._folder):
                part = self._parts.get((stream, day)) or self._open(stream, day, batch.schema)
                part.batches.append(rows)
                part.rows += rows.num_rows
                self._rows += rows.num_rows
                if part.rows >= _ROWS:
                    self._write(part)
                elif self._rows >= _MOST_ROWS:
                    self._write(max(self._parts.values(), key=attrgetter("rows")))

    def commit(self) -> Mapping[Path, int]:
        """Finish all files; return their numbers of events."""
        with disk_errors(self._folder):
            for part in self._parts.values():
                self._write(part)
                part.close()
            for part in self._parts.values():
                part.partial.replace(part.path)
        done = {part.path: part.written for part in self._parts.values()}
        self._parts.clear()
        return done

    def _open(self, stream: Stream, day: int, schema: Any) -> _Part:
        if len(self._parts) >= _MOST_FILES:
            raise UnavailableError(f"the events cover more than {_MOST_FILES} days: set --since and --until")
        folder = self._folder / stream.topic / f"date={np.datetime64(day, 'D')}"
        folder.mkdir(parents=True, exist_ok=True)
        # Registered first, so that its file is deleted whatever happens, a signal included.
        part = self._parts[stream, day] = _Part(folder / self._name)
        part.file = create(part.partial)
        if self._is_csv:
            part.writer = pyarrow.csv.CSVWriter(part.file, _plain(schema), write_options=_CSV)
        else:
            texts = [each.name for each in schema if pa.types.is_dictionary(each.type)]
            maps = [each.name for each in schema if pa.types.is_map(each.type)]
            texts += [f"{name}.key_value.{half}" for name in maps for half in ("key", "value")]
            part.writer = pyarrow.parquet.ParquetWriter(
                part.file, schema, compression="zstd", use_dictionary=texts, write_statistics=["ts_ns"]
            )
        return part

    def _write(self, part: _Part) -> None:
        if not part.rows:
            return
        table = pa.Table.from_batches(part.batches)
        if self._is_csv:
            part.writer.write_table(_plain_table(table))
        else:
            part.writer.write_table(table.unify_dictionaries(), row_group_size=_ROWS)
        part.written += part.rows
        self._rows -= part.rows
        part.batches, part.rows = [], 0


def _plain(schema: Any) -> Any:
    """Return a schema without what CSV does not have, dictionaries and time zones."""
    return pa.schema(
        pa.field(each.name, pa.string() if _is_text(each.type) else each.type, each.nullable) for each in schema
    )


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_dictionary(kind) or pa.types.is_timestamp(kind))


def _plain_table(table: Any) -> Any:
    """Return a table of the plain schema. Arrow looks up the time zone for each value, which costs more than a row."""
    columns = [
        pc.binary_join_element_wise(column.cast(pa.timestamp(column.type.unit)).cast(pa.string()), "Z", "")
        if pa.types.is_timestamp(column.type)
        else column
        for column in table.columns
    ]
    return pa.Table.from_arrays(columns, names=table.column_names).cast(_plain(table.schema))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise UnavailableError instead of OSError."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UnavailableError(f"cannot write to {path}: {reason}") from error
