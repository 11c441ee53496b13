"""Batches of messages as columns, decoded by the native module."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer import _native
from producer.consume.plan import TEXTS, Fields, Plan
from producer.events import Ints, Mask

Values = list[bytes | None]
"""The values of messages."""

_SEED = int.from_bytes(os.urandom(8))
"""Makes hashes unpredictable: a writer must not be able to make texts collide."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Decoded messages, by column.

    `rows` has the index of each message in its batch, ascending. A column of texts or maps has indexes in `texts`,
    which are distinct; `hashes` are of the texts, the same for the same text while the process lives. `valid` is False
    where a nullable field is null or the writer's schema lacks it: the cell is then 0.
    """

    rows: Ints
    cells: dict[str, Ints]
    valid: dict[str, Mask]
    texts: list[str]
    hashes: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Ints:
        return self.cells[name]

    def plus(self, **cells: Ints) -> "Columns":
        """Return the same with more columns."""
        return replace(self, cells={**self.cells, **cells})

    def select(self, chosen: NDArray[Any]) -> "Columns":
        """Return the chosen rows: a mask, or ascending distinct indexes."""
        if bool(chosen.all()) if chosen.dtype == np.bool_ else len(chosen) == len(self):
            return self
        cells = {name: column[chosen] for name, column in self.cells.items()}
        valid = {name: column[chosen] for name, column in self.valid.items()}
        return Columns(self.rows[chosen], cells, valid, self.texts, self.hashes)


class Column(NamedTuple):
    """Values of a field. Where `valid` is false, the value is null.

    Cells are numbers, or indexes in `texts` if there are any. Different indexes are different texts.
    """

    cells: NDArray[Any]
    valid: Mask
    texts: list[str] | None = None
    is_map: bool = False
    """The texts are those of maps."""

    def values(self) -> list[Any]:
        """Return the values as Python objects."""
        values: list[Any]
        if self.texts is not None:
            found: list[Any] = [*self.texts, None]
            used = np.where(self.valid, self.cells, len(self.texts))
            for at in np.unique(used[self.valid]).tolist() if self.is_map else ():
                found[at] = text_to_map(self.texts[at])
            values = np.array(found, object)[used].tolist()
            return values
        values = self.cells.tolist()
        if self.valid.all():
            return values
        return [value if has else None for value, has in zip(values, self.valid.tolist(), strict=True)]

    def select(self, chosen: Mask) -> "Column":
        """Return the chosen rows."""
        return self._replace(cells=self.cells[chosen], valid=self.valid[chosen])


@dataclass(frozen=True, slots=True)
class Table:
    """Messages of one schema: `cells` and `valid` by column and message, and the native decoder's `status`.

    Cells are integers, the bits of doubles, or indexes in `texts`, which also has the texts of maps.
    """

    plan: Plan
    cells: Ints
    valid: Mask
    status: NDArray[np.uint8]
    texts: list[str]
    hashes: Ints

    def columns(self) -> dict[str, Column]:
        """Return the columns of the messages that could be decoded."""
        decoded, found = self.status == 0, {}
        for name, kind, cells, valid in zip(self.plan.names, self.plan.types, self.cells, self.valid, strict=True):
            texts = self.texts if kind in TEXTS else None
            found[name] = Column(_typed(kind, cells[decoded]), valid[decoded], texts, kind == "map")
        return found


def _typed(kind: str, cells: Ints) -> NDArray[Any]:
    if kind in ("float", "double"):
        return cells.view(np.float64)
    return cells.astype(np.bool_) if kind == "boolean" else cells


def map_to_text(found: Mapping[str, str]) -> str:
    """Return the text of a map in a column, the same for equal maps: a JSON object with its keys in order."""
    return json.dumps(found, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def text_to_map(text: str) -> dict[str, str]:
    """Return the map of a text in a column of maps."""
    found: dict[str, str] = json.loads(text)
    return found


def schema_ids(values: Values) -> Ints:
    """Return each value's schema id: -1 if it is not in Confluent's wire format, -2 if it is too long."""
    return np.frombuffer(_native.schema_ids(values), np.int64)


def decode(values: Values, plan: Plan) -> Table:
    """Decode values of one schema."""
    shape = len(plan.names), len(values)
    cells, valid, status, (texts, hashes) = _native.decode(values, plan.steps, len(plan.names), _SEED, map_to_text)
    return Table(
        plan,
        np.frombuffer(cells, np.int64).reshape(shape),
        np.frombuffer(valid, np.bool_).reshape(shape),
        np.frombuffer(status, np.uint8),
        texts,
        np.frombuffer(hashes, np.int64),
    )


def joined(fields: Fields, parts: Sequence[tuple[Ints, Table]]) -> Columns:
    """Return the decoded messages of tables with the columns `fields`, given with their rows, in order of the rows."""
    tables = [table for _, table in parts]
    decoded = [table.status == 0 for table in tables]
    rows = _concatenated([rows[chosen] for (rows, _), chosen in zip(parts, decoded, strict=True)])
    order = np.argsort(rows, kind="stable") if len(parts) > 1 else slice(None)
    bases = np.cumsum([0, *(len(table.texts) for table in tables)]).tolist()
    all_decoded = all(bool(chosen.all()) for chosen in decoded)

    def gathered(pieces: list[Any]) -> Any:
        if not all_decoded:
            pieces = [piece[chosen] for piece, chosen in zip(pieces, decoded, strict=True)]
        return _concatenated(pieces)[order]

    cells, valid = {}, {}
    for column, (name, kind) in enumerate(fields):
        is_text = kind.removesuffix("?") in TEXTS
        pieces = [table.cells[column] for table in tables]
        if is_text and len(tables) > 1:
            pieces = [piece + base for piece, base in zip(pieces, bases, strict=False)]
        cells[name] = gathered(pieces)
        if kind.endswith("?"):
            valid[name] = gathered([table.valid[column] for table in tables]).astype(np.bool_, copy=False)
            if is_text and len(tables) > 1:
                cells[name] *= valid[name]
    texts = [text for table in tables for text in table.texts]
    return Columns(rows[order], cells, valid, texts, _concatenated([table.hashes for table in tables]))


def _concatenated(pieces: Sequence[Ints]) -> Ints:
    return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])


def rows_of(columns: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
    """Yield the rows of columns as Python objects, by name."""
    for row in zip(*(column.values() for column in columns.values()), strict=True):
        yield dict(zip(columns, row, strict=True))


def passing(cells: Ints, valid: Mask, texts: Sequence[str], test: Callable[[str], bool]) -> Mask:
    """Return which cells of a column have a text that passes a test, which sees each text once; null does not."""
    used, passes = np.zeros((2, len(texts) + 1), np.bool_)
    used[cells[valid]] = True
    passes[used] = [test(texts[at]) for at in np.flatnonzero(used).tolist()]
    passed: Mask = passes[np.where(valid, cells, len(texts))]
    return passed


def groups(*columns: Ints) -> tuple[Ints, Ints]:
    """Number the distinct rows of up to 8 columns, in order of appearance.

    Return each row's number, and each number's first row.
    """
    ids, firsts = _native.groups(_SEED, *map(np.ascontiguousarray, columns))
    return np.frombuffer(ids, np.int64), np.frombuffer(firsts, np.int64)
