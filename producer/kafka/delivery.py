"""The batches in flight, and delivery reports split by batch and result."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from producer.events import EncodedBatch, Ints
from producer.kafka.librdkafka import Reports


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Consecutive reports of one batch with the same result."""

    number: int
    """The batch's."""
    code: int
    """0: acknowledged."""
    rows: Ints
    """The messages' indexes in their batch."""
    alone: bool
    """Whether each message was in its own request."""

    def __len__(self) -> int:
        return len(self.rows)


def runs(reports: Reports, *, alone: bool) -> list[Run]:
    """Return the runs of delivery reports. librdkafka reports a request's messages in their order, so runs are long."""
    return [Run(number, code, reports.rows[first:end], alone) for number, code, first, end in reports.runs]


@dataclass(slots=True, eq=False)
class Delivery:
    """The delivery of a batch, until all of its messages are acknowledged or lost."""

    number: int
    batch: EncodedBatch
    open: int
    """Messages that are neither acknowledged nor lost."""
    lost: Counter[str] = field(default_factory=Counter)
    _closed: list[Run] = field(default_factory=list)

    def close(self, run: Run) -> None:
        """Record that a run's messages were acknowledged or lost."""
        self.open -= len(run)
        if self.open:
            self._closed.append(run)

    def open_rows(self) -> Ints:
        """Return the indexes of the open messages, in order."""
        is_open = np.ones(len(self.batch), np.bool_)
        for run in self._closed:
            is_open[run.rows] = False
        return np.flatnonzero(is_open)
