"""Events as numpy columns: numbers with nulls as 0, and texts as codes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from producer.consume.columns import groups
from producer.events import Ints


class Frame:
    """Events of one stream, from an Arrow table with a column ts_ns."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._cache: dict[str, Any] = {}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def numbers(self, name: str) -> Ints:
        """Return a column of integers, null as 0."""
        numbers: Ints = self._once(name, lambda: _numbers(self._table[name]))
        return numbers

    def codes(self, name: str) -> Ints:
        """Return a column of texts as indexes in `texts(name)`, null as -1."""
        codes: Ints = self._texts(name)[0]
        return codes

    def texts(self, name: str) -> list[str]:
        """Return the distinct texts of a column."""
        texts: list[str] = self._texts(name)[1]
        return texts

    def text(self, name: str, row: int) -> str | None:
        """Return the text of an event; None if it is null."""
        code = int(self.codes(name)[row])
        return None if code < 0 else self.texts(name)[code]

    def connections(self) -> tuple[Ints, Ints]:
        """Number the connections; return each event's number, and each connection's first event.

        The cookie alone would do, but is null where a kernel cannot tell it.
        """
        names = [self.codes(name) for name in ("host", "boot_id", "saddr", "daddr")]
        return groups(*names, *(self.numbers(name) for name in ("sk_cookie", "netns", "sport", "dport")))

    def distinct(self) -> "Frame":
        """Return the events without copies, which have the same number; 0 is none."""
        numbers = self.numbers("cpu_seq")
        _, firsts = groups(self.codes("host"), self.codes("boot_id"), self.numbers("cpu"), numbers)
        kept = numbers == 0
        kept[firsts] = True
        return self if kept.all() else Frame(self._table.filter(pa.array(kept)))

    def _texts(self, name: str) -> Any:
        if name not in self._table.column_names:  # this version's schema lacks the field
            return np.full(len(self), -1, np.int64), []
        return self._once(f"texts {name}", lambda: _texts(self._table[name]))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]


def _numbers(column: Any) -> Ints:
    filled = column.cast(pa.int64()).fill_null(0)
    return np.asarray(filled.to_numpy(), np.int64)


def _texts(column: Any) -> tuple[Ints, list[str]]:
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), [])
    codes = whole.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.asarray(codes, np.int64), whole.dictionary.to_pylist()
