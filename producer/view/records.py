"""Records of one stream, by column."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from producer.consume.columns import Column, Table, map_to_text, rows_of
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Mask, Stream


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Records of a stream. A field that their schema does not have is null in all of them."""

    stream: Stream
    size: int
    columns: dict[str, Column]

    @classmethod
    def from_table(cls, stream: Stream, table: Table) -> "Records":
        """Return the messages of a table that could be decoded."""
        return cls(stream, int(np.count_nonzero(table.status == 0)), table.columns())

    @classmethod
    def from_rows(cls, stream: Stream, rows: Sequence[dict[str, Any]]) -> "Records":
        """Return records from Python objects that all have the same fields."""
        names = rows[0] if rows else ()
        return cls(stream, len(rows), {name: _column([row[name] for row in rows]) for name in names})

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, name: str) -> Column:
        return self.columns.get(name) or Column(np.zeros(self.size, np.int64), np.zeros(self.size, np.bool_))

    def select(self, chosen: Mask) -> "Records":
        """Return the chosen rows."""
        if chosen.all():
            return self
        size = int(np.count_nonzero(chosen))
        return Records(self.stream, size, {name: each.select(chosen) for name, each in self.columns.items() if size})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return each record."""
        return rows_of(self.columns)


Row = tuple[Stream, dict[str, Any]]
"""A record with its stream."""


def in_order(batch: Iterable[Records]) -> list[Row]:
    """Return the records of several streams in order of time."""
    rows = [(records.stream, row) for records in batch for row in records.rows()]
    return sorted(rows, key=lambda row: row[1]["ts_ns"])


def stream_of(names: Collection[str]) -> Stream | None:
    """Return the stream whose records have these fields; None for other records of ours."""
    if "cause" in names:
        return RETRANSMITS
    return FLOWS if "reason" in names else TRANSMITS if "is_retransmit" in names else None


def _column(values: Iterable[Any]) -> Column:
    found = list(values)
    valid = np.array([value is not None for value in found], np.bool_)
    if is_map := any(isinstance(value, dict) for value in found):
        found = [None if value is None else map_to_text(value) for value in found]
    if any(isinstance(value, str) for value in found):
        texts = list(dict.fromkeys(value for value in found if value is not None))
        index = {text: at for at, text in enumerate(texts)}
        return Column(np.array([index.get(value, 0) for value in found], np.int64), valid, texts, is_map)
    kind = np.bool_ if any(isinstance(value, bool) for value in found) else np.int64
    return Column(np.array([value or 0 for value in found], kind), valid)
