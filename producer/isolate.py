"""Encoding that gives up the events that cannot be encoded, and no others.

A ring may hold anything: what another version wrote, or memory that was damaged. One such record must neither end the
producer nor come back at its next start.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from producer.events import Batch, EncodedBatch, Rows


class Unencodable(ValueError):
    """Rows hold numbers that no event can have; `rows` is a mask of them."""

    def __init__(self, text: str, rows: NDArray[np.bool_]) -> None:
        super().__init__(text)
        self.rows = rows


class Encoder(Protocol):
    """What encodes whole batches, or raises."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        """Encode a batch."""


class Isolator:
    """Encodes what can be encoded; `refuse` gets each row that cannot, as an array of one, and the reason."""

    def __init__(self, encoder: Encoder, refuse: Callable[[Rows, str], None]) -> None:
        self._encoder = encoder
        self._refuse = refuse

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch | None:
        """Encode a batch without the rows that cannot be encoded; None where none is left."""
        try:
            return self._encoder.encode(batch, utc_offset_ns)
        except Unencodable as error:
            bad = dict.fromkeys(np.flatnonzero(error.rows).tolist(), str(error))
        except Exception:  # a defect: it may cost the rows that it is about
            bad = self._find(batch, utc_offset_ns, 0, len(batch.rows))
        for row, reason in bad.items():
            self._refuse(batch.rows[row : row + 1], reason)
        good = np.delete(batch.rows, list(bad))
        return self.encode(Batch(batch.stream, good), utc_offset_ns) if len(good) and bad else None

    def _find(self, batch: Batch, utc_offset_ns: int, first: int, end: int) -> dict[int, str]:
        """Return the rows from `first` to before `end` that cannot be encoded by themselves, and why."""
        try:
            self._encoder.encode(Batch(batch.stream, batch.rows[first:end]), utc_offset_ns)
        except Exception as error:  # the same defect
            if end - first == 1:
                return {first: f"{type(error).__name__}: {error}"}
            middle = (first + end) // 2
            return self._find(batch, utc_offset_ns, first, middle) | self._find(batch, utc_offset_ns, middle, end)
        return {}
