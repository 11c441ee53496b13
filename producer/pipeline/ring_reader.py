"""Reads a ring in encoded batches."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from producer.events import Batch, EncodedBatch, Stream, common
from producer.pipeline.interfaces import Encoder, Ring

BATCH_ROWS = 4096
"""Most rows of a batch."""
_UNENCODABLE = "encode"
"""Reason of a loss: the event cannot be encoded."""
_DAMAGED = "ring_damaged"
"""Reason of a loss: the event's record in the ring is damaged."""


@dataclass(frozen=True, slots=True)
class Read:
    """The result of a read: a batch, unless none of the records could be encoded."""

    batch: EncodedBatch | None
    oldest_ns: int
    """Kernel time of the first row."""
    position: int
    """Ring position after the records."""
    refused: Counter[str]
    """Events that are not in the batch, by reason."""
    more: bool
    """Whether the ring likely has more."""


class RingReader:
    """Reads and encodes the rows of `ring`, which has a stream's rows."""

    def __init__(self, stream: Stream, ring: Ring, encoder: Encoder) -> None:
        self._stream = stream
        self._ring = ring
        self._encoder = encoder

    @contextmanager
    def read(self, limit: int, utc_offset_ns: int) -> Iterator[Read | None]:
        """Read and encode up to `limit` rows; None if there are none. If the block fails, they will be read again."""
        before = self._ring.position
        try:
            yield self._next(before, min(limit, BATCH_ROWS), utc_offset_ns)
        except Exception:
            self._ring.position = before
            raise

    def _next(self, before: int, limit: int, utc_offset_ns: int) -> Read | None:
        rows = self._ring.read(limit)
        if is_cut := len(rows) > 0 and (fit := self._encoder.fit(rows)) < len(rows):
            self._ring.position = before
            rows = self._ring.read(fit)
        damaged = self._ring.damaged
        if not len(rows) and not damaged:
            return None
        batch, oldest_ns = None, 0
        if len(rows):
            oldest_ns = int(common(rows)["ts"][0])
            batch = self._encoder.encode(Batch(self._stream, rows), utc_offset_ns)
        refused = +Counter({_UNENCODABLE: len(rows) - len(batch or ()), _DAMAGED: damaged})
        more = is_cut or len(rows) + damaged == BATCH_ROWS
        return Read(batch, oldest_ns, self._ring.position, refused, more)
