"""What the pipeline asks of its neighbours: of a ring, an encoder, a sink, and a spool."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from producer.events import Batch, EncodedBatch, Rows, Stream
from producer.spool.format import Spooled


class Ring(Protocol):
    """What the pipeline asks of a ring."""

    position: int
    """Behind the last row read."""
    damaged: int
    """Records that the last `read` has passed over because they are damaged."""

    @property
    def records_before(self) -> int:
        """Number of rows before `position` since the ring was made."""

    @property
    def fill(self) -> float:
        """Share of the ring that is taken."""

    def holds(self, position: int) -> bool:
        """Say whether `position` is between two rows that are not committed, or at an end of them."""

    def read(self, limit: int) -> Rows:
        """Return up to `limit` rows and move `position` behind them."""

    def commit(self, position: int) -> None:
        """Give back the room before `position`."""


class Encoder(Protocol):
    """What the pipeline asks of an encoder."""

    def fit(self, rows: Rows) -> int:
        """Return how many of the rows, from the first on, are encoded in a short time: at least one."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch | None:
        """Encode a batch, without the rows that cannot be encoded; None where none is left."""


class Outcome(Protocol):
    """What a sink says of one stream's messages."""

    @property
    def delivered(self) -> int:
        """Messages acknowledged."""

    @property
    def lost(self) -> Mapping[str, int]:
        """Messages given up, by reason."""

    @property
    def done(self) -> Sequence[tuple[EncodedBatch, Counter[str]]]:
        """Batches with no message left in flight, and what each has lost."""


class Sink(Protocol):
    """What the pipeline asks of a sink."""

    def capacity(self, stream: Stream) -> int:
        """Return how many messages of a stream may be sent now."""

    def send(self, batch: EncodedBatch) -> None:
        """Queue a batch; it may be larger than the room that there is."""

    def poll(self) -> Mapping[str, Outcome]:
        """Return what became of messages since the last call, by stream."""

    def unacknowledged(self, batch: EncodedBatch) -> int:
        """Return how many messages of a batch are still under way."""


class Spool(Protocol):
    """What the pipeline asks of a spool: producer.spool.spool says what its numbers are."""

    acked: int
    sent: int
    end: int
    discarded: int
    lost: Counter[str]

    def append(self, batch: EncodedBatch, ring: str, position: int) -> None:
        """Write a batch; OSError where that cannot be."""

    def read(self) -> Spooled | None:
        """Return the next batch that was not sent."""

    def ack(self, first: int, end: int) -> None:
        """Note that a batch is done."""

    def sweep(self) -> None:
        """Delete what is done."""


class Waits(Protocol):
    """The waits between tries."""

    def next(self) -> float:
        """Return the seconds to wait."""

    def reset(self) -> None:
        """Begin with short waits again."""
