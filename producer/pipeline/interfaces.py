"""The interfaces that the pipeline needs besides a spool: ring, encoder and sink."""

from collections.abc import Mapping
from typing import Protocol

from producer.events import Batch, EncodedBatch, Outcome, Rows, Stream


class Ring(Protocol):
    """A ring buffer with a read position and a committed position."""

    position: int
    """After the last row read."""
    damaged: int
    """Damaged records that the last `read` skipped."""

    @property
    def records_before(self) -> int:
        """Number of rows before `position` since the ring was created."""

    @property
    def fill(self) -> float:
        """Used share of the ring."""

    @property
    def unread(self) -> int:
        """Number of rows after `position`."""

    @property
    def unread_share(self) -> float:
        """Share of the ring that these rows use."""

    def holds(self, position: int) -> bool:
        """Whether `position` is a boundary of uncommitted rows, the first and last boundaries included."""

    def read(self, limit: int) -> Rows:
        """Return up to `limit` rows and move `position` past them."""

    def commit(self, position: int) -> None:
        """Free the space before `position`."""


class Encoder(Protocol):
    """Encodes rows as messages."""

    def fit(self, rows: Rows) -> int:
        """Return how many leading rows can be encoded in a short time: at least one."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch | None:
        """Encode a batch without the rows that cannot be encoded; None if there are no others."""


class Sink(Protocol):
    """Sends batches and reports on their delivery."""

    def capacity(self, stream: Stream) -> int:
        """Return how many messages of a stream can be sent now."""

    def send(self, batch: EncodedBatch) -> None:
        """Queue a batch, which may exceed the capacity."""

    def poll(self) -> Mapping[str, Outcome]:
        """Return the delivery reports since the last call, by stream."""

    def unacknowledged(self, batch: EncodedBatch) -> int:
        """Return how many messages of a batch are still in flight."""


class Waits(Protocol):
    """The waits between retries."""

    def next(self) -> float:
        """Return the seconds to wait."""

    def reset(self) -> None:
        """Start again with short waits."""
