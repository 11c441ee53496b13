"""Reads a ring in encoded batches."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from producer.events import Batch, EncodedBatch, Rows, Stream, common
from producer.pipeline.interfaces import Encoder, Ring

BATCH_ROWS = 4096
"""Most rows of a batch: as many as the encoder takes at once."""
_REQUEST_ROWS = 8192
"""Most rows of a request: of two batches."""
_TYPICAL_ROWS = 8
"""Rows of the smallest batch by which the size of a request is estimated: for fewer, that costs more than it saves."""
_REQUEST_BYTES = 980_000
"""A little less than a produce request of librdkafka may have: 1,000,000, by batch.size and message.max.bytes."""
_MESSAGE_BYTES = 36
"""What it adds to the length of each key and value when it measures that."""
_UNENCODABLE = "encode"
"""Reason of a loss: the event cannot be encoded."""
_DAMAGED = "ring_damaged"
"""Reason of a loss: the event's record in the ring is damaged."""


@dataclass(frozen=True, slots=True)
class Read:
    """The result of a read: a batch, unless none of the records could be encoded."""

    rows: Rows
    """Valid until a position after them is committed."""
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
    """Reads and encodes the rows of `ring`, which has a stream's rows. `count` gets the rows of each complete read."""

    def __init__(
        self, stream: Stream, ring: Ring, encoder: Encoder, count: Callable[[Rows], None] | None = None
    ) -> None:
        self._stream = stream
        self._ring = ring
        self._encoder = encoder
        self._count = count
        self.request_rows = _REQUEST_ROWS
        """Rows that fit into one produce request, by the last batch that was not small, but at most _REQUEST_ROWS."""

    @contextmanager
    def read(self, limit: int, utc_offset_ns: int) -> Iterator[Read | None]:
        """Read and encode up to `limit` rows; None if there are none. If the block fails, they will be read again."""
        before = self._ring.position
        try:
            read = self._next(before, min(limit, BATCH_ROWS), utc_offset_ns)
            yield read
        except Exception:
            self._ring.position = before
            raise
        if self._count and read and len(read.rows):
            self._count(read.rows)

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
            if batch and len(batch) >= _TYPICAL_ROWS:
                self.request_rows = _request_rows(batch)
        refused = Counter[str]()
        if unencodable := len(rows) - len(batch or ()):
            refused[_UNENCODABLE] = unencodable
        if damaged:
            refused[_DAMAGED] = damaged
        more = is_cut or len(rows) + damaged == limit
        return Read(rows, batch, oldest_ns, self._ring.position, refused, more)


def _request_rows(batch: EncodedBatch) -> int:
    """Return how many messages like those of a batch fit into one produce request."""
    total_bytes = int(batch.lengths.sum() + batch.key_lengths.sum())
    return min(_REQUEST_ROWS, max(1, _REQUEST_BYTES * len(batch) // (total_bytes + _MESSAGE_BYTES * len(batch))))
