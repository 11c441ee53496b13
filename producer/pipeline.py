"""The way of the data, for all streams: rows out of a ring, encoded, sent, and the ring's room given back once they are
done.

The ring is the log: a batch's room goes back to the kernel only when Kafka has acknowledged (or finally refused) every
message of it and of all before it. When the sink has no room, rows stay in the ring; when the ring is full, the kernel
counts what it cannot take. Nothing else is buffered, and nothing waits.

One thread calls `step` in a loop. It opens nothing and reads no clock but through what it is given.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from producer.events import Batch, EncodedBatch, Rows, Stream

_BATCH_ROWS = 4096


class Ring(Protocol):
    """What the pipeline asks of a ring."""

    @property
    def position(self) -> int:
        """Behind the last row read."""

    def read(self, limit: int) -> Rows:
        """Return up to `limit` rows and move `position` behind them."""

    def commit(self, position: int) -> None:
        """Give back the room before `position`."""


class Encoder(Protocol):
    """What the pipeline asks of an encoder."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        """Encode a batch."""


class Outcome(Protocol):
    """What a sink says of one stream's messages."""

    @property
    def delivered(self) -> int:
        """Messages acknowledged."""

    @property
    def lost(self) -> Mapping[str, int]:
        """Messages given up, by reason."""

    @property
    def done(self) -> Sequence[EncodedBatch]:
        """Batches with no message left in flight."""


class Sink(Protocol):
    """What the pipeline asks of a sink."""

    def room(self, stream: Stream) -> int:
        """Return how many messages of a stream may be sent now."""

    def send(self, batch: EncodedBatch) -> None:
        """Queue a batch, of at most as many messages as there is room for."""

    def poll(self) -> Mapping[str, Outcome]:
        """Return what became of messages since the last call, by stream."""


@dataclass(slots=True, eq=False)
class Path:
    """One stream's way, and its account: events delivered, lost by reason, and in flight."""

    stream: Stream
    ring: Ring
    encoder: Encoder
    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    _ends: deque[int] = field(default_factory=deque)
    """Ring positions behind the batches in flight, in the ring's order."""
    _done: set[int] = field(default_factory=set)

    def next_batch(self, room: int) -> Batch | None:
        """Return the ring's next rows, at most `room`; None where there are none."""
        rows = self.ring.read(min(room, _BATCH_ROWS))
        if not len(rows):
            return None
        self._ends.append(self.ring.position)
        return Batch(self.stream, rows, self.ring.position)

    def settle(self, outcome: Outcome) -> None:
        """Take account of delivery reports, and give the ring's room back up to the first batch that is not done."""
        self.delivered += outcome.delivered
        self.lost.update(outcome.lost)
        self._done.update(batch.end for batch in outcome.done)
        position = None
        while self._ends and self._ends[0] in self._done:
            position = self._ends.popleft()
            self._done.remove(position)
        if position is not None:
            self.ring.commit(position)


class Pipeline:
    """Moves events of all `paths` to `sink`; `utc_offset_ns` returns what the monotonic clock lacks to UTC."""

    def __init__(self, paths: Sequence[Path], sink: Sink, utc_offset_ns: Callable[[], int]) -> None:
        self._paths = {path.stream.name: path for path in paths}
        self._sink = sink
        self._utc_offset_ns = utc_offset_ns

    def step(self) -> bool:
        """Send what the rings hold, and take account of delivery reports. Return whether more is likely to wait."""
        more = False
        for path in self._paths.values():
            batch = path.next_batch(self._sink.room(path.stream))
            if batch is not None:
                self._sink.send(path.encoder.encode(batch, self._utc_offset_ns()))
                more |= len(batch.rows) == _BATCH_ROWS
        for name, outcome in self._sink.poll().items():
            self._paths[name].settle(outcome)
        return more
