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

    def fit(self, rows: Rows) -> int:
        """Return how many of the rows, from the first on, are encoded in a short time."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        """Encode a batch."""


class Isolator:
    """Encodes what can be encoded; `refuse` gets the rows that cannot, each time those with one reason."""

    def __init__(self, encoder: Encoder, refuse: Callable[[Rows, str], None]) -> None:
        self._encoder = encoder
        self._refuse = refuse

    def fit(self, rows: Rows) -> int:
        """Return how many of the rows, from the first on, are encoded in a short time."""
        return self._encoder.fit(rows)

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch | None:
        """Encode a batch without the rows that cannot be encoded; None where none is left.

        An error that is about no row, as a lack of memory, is raised: another try may succeed.
        """
        try:
            return self._encoder.encode(batch, utc_offset_ns)
        except Unencodable as error:
            bad = {str(error): np.flatnonzero(error.rows).tolist()}
        except (MemoryError, OSError):
            raise
        except Exception:  # a defect: it may cost the rows that it is about
            bad = self._find(batch, utc_offset_ns)
            if not bad:
                raise
        for reason, rows in bad.items():
            self._refuse(batch.rows[rows], reason)
        good = np.delete(batch.rows, [row for rows in bad.values() for row in rows])
        return self.encode(Batch(batch.stream, good), utc_offset_ns) if len(good) else None

    def _find(self, batch: Batch, utc_offset_ns: int) -> dict[str, list[int]]:
        """Return the rows that cannot be encoded by themselves, by reason."""
        bad: dict[str, list[int]] = {}
        ranges = [(0, len(batch.rows))]
        while ranges:
            first, end = ranges.pop()
            try:
                self._encoder.encode(Batch(batch.stream, batch.rows[first:end]), utc_offset_ns)
            except Exception as error:  # the same defect
                if end - first == 1:
                    bad.setdefault(f"{type(error).__name__}: {error}", []).append(first)
                else:
                    middle = (first + end) // 2
                    ranges += [(first, middle), (middle, end)]
        return bad
