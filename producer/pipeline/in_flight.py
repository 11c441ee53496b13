"""The batches in flight of a ring or a spool, oldest first."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from producer.events import EncodedBatch


@dataclass(slots=True, eq=False)
class InFlightBatch:
    """A batch in flight."""

    batch: EncodedBatch
    sent_at_s: float
    oldest_ns: int = 0
    """Kernel time of its first row; 0 if it was read from the spool."""
    position: int = 0
    """Ring position after it, if it came from the ring."""
    first: int = 0
    """Number of its first event in the spool, if it is there."""
    done: bool = False
    lost: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """Events next to it in the ring that cannot be sent, by reason."""


class InFlightBatches:
    """Batches in flight. They may be done in any order, and are removed in the order in which they were sent."""

    def __init__(self) -> None:
        self._entries: OrderedDict[EncodedBatch, InFlightBatch] = OrderedDict()

    @property
    def oldest(self) -> InFlightBatch | None:
        """The first batch."""
        return next(iter(self._entries.values()), None)

    @property
    def newest(self) -> InFlightBatch | None:
        """The last batch."""
        return next(reversed(self._entries.values()), None)

    def add(self, entry: InFlightBatch) -> None:
        """Add a batch after all others."""
        self._entries[entry.batch] = entry

    def pop(self) -> InFlightBatch:
        """Remove the first batch."""
        return self._entries.popitem(last=False)[1]

    def finish(self, batch: EncodedBatch, lost: Counter[str]) -> InFlightBatch | None:
        """Note that a batch has no messages in flight now; return it, or None if it is not one of these."""
        if entry := self._entries.get(batch):
            entry.done, entry.lost = True, lost
        return entry

    def pop_done(self) -> Iterator[InFlightBatch]:
        """Remove the batches that are done, up to the first that is not."""
        while (entry := self.oldest) and entry.done:
            yield self.pop()

    def __iter__(self) -> Iterator[InFlightBatch]:
        return iter(self._entries.values())
