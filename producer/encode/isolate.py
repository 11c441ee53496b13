"""Isolates events that cannot be encoded, so that only these are lost.

A ring may hold anything: records of another version, or damaged memory. Such a record must neither end the producer nor
come back at the next start.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from producer.events import Batch, EncodedBatch, Mask, Rows

_MANY = 1 << 12
_FEW = 64
"""Rows per call while a defect shows: a search among these needs fewer than the maximum of tries."""
_MOST_TRIES = 256
_MOST_REASONS = 8


class Unencodable(ValueError):
    """Rows have numbers that no event can have; `rows` is a mask of these rows."""

    def __init__(self, text: str, rows: Mask) -> None:
        super().__init__(text)
        self.rows = rows


class Encoder(Protocol):
    """Encodes whole batches, or raises."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        """Encode a batch."""


class Isolator:
    """Encodes what can be encoded, and passes other rows to `refuse`, grouped by reason.

    The search for rows that trigger a defect is bounded: if it takes too long, the error is raised, and `fit` asks for
    fewer rows until the defect no longer shows.
    """

    def __init__(self, encoder: Encoder, refuse: Callable[[Rows, str], None]) -> None:
        self.encoder = encoder
        """May be replaced between two batches."""
        self._refuse = refuse
        self._most = _MANY

    def fit(self, rows: Rows) -> int:
        """Return how many leading rows may be encoded at once: fewer while a defect shows."""
        return min(len(rows), self._most)

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch | None:
        """Encode a batch without the rows that cannot be encoded; None if there are no others.

        Errors that no row causes, such as lack of memory, are raised: a retry may succeed.
        """
        try:
            encoded = self.encoder.encode(batch, utc_offset_ns)
            self._most = min(2 * self._most, _MANY)
            return encoded
        except Unencodable as error:
            bad = {str(error): np.flatnonzero(error.rows).tolist()}
        except (MemoryError, OSError):
            raise
        except Exception:  # a defect: drop only the rows that trigger it
            bad = self._find(batch, utc_offset_ns)
            if not bad:
                raise
            self._most = _FEW
        for reason, rows in bad.items():
            self._refuse(batch.rows[rows], reason)
        good = np.delete(batch.rows, [row for rows in bad.values() for row in rows])
        return self.encode(Batch(batch.stream, good), utc_offset_ns) if len(good) else None

    def _find(self, batch: Batch, utc_offset_ns: int) -> dict[str, list[int]]:
        """Return the rows that cannot be encoded even alone, by reason; none if the search takes too long."""
        bad: dict[str, list[int]] = {}
        ranges = [(0, len(batch.rows))]
        tries = 0
        while ranges:
            tries += 1
            if tries > _MOST_TRIES:
                self._most = _FEW
                return {}
            first, end = ranges.pop()
            try:
                self.encoder.encode(Batch(batch.stream, batch.rows[first:end]), utc_offset_ns)
            except (MemoryError, OSError):  # no row causes it: none may be dropped for it
                raise
            except Exception as error:  # the same defect
                if end - first == 1:
                    reason = f"{type(error).__name__}: {error}"
                    bad.setdefault(reason if reason in bad or len(bad) < _MOST_REASONS else "others", []).append(first)
                else:
                    middle = (first + end) // 2
                    ranges += [(first, middle), (middle, end)]
        return bad
