"""Sends a stream's spooled events, oldest first."""

from producer.events import Outcome, Stream
from producer.pipeline.account import StreamAccount
from producer.pipeline.in_flight import InFlightBatch, InFlightBatches
from producer.pipeline.interfaces import Sink
from producer.spool.spool import Spool

_MOST_BATCHES = 32
"""Batches sent per call: each may be a few messages."""


class SpoolSender:
    """Reads a spool, sends its batches, and acknowledges them in the spool once they are done.

    `account` counts them and makes the checkpoints. `rebpf spool replay` needs nothing else.
    """

    def __init__(self, stream: Stream, spool: Spool, account: StreamAccount) -> None:
        self.stream = stream
        self.spool = spool
        self.account = account
        self.in_flight = InFlightBatches()
        self.error = ""
        """Why the spool cannot be read; empty if it can."""

    @property
    def has_unsent(self) -> bool:
        """Whether the spool has events that were not sent."""
        return self.spool.sent < self.spool.end

    @property
    def waiting(self) -> int:
        """Events in the spool that are not in flight."""
        return self.spool.pending - sum(len(entry.batch) for entry in self.in_flight)

    def send(self, sink: Sink, now_s: float) -> bool:
        """Send the next batches; return whether there are likely more."""
        more = self._send(sink, now_s)
        if self._acknowledge_rest():
            self.account.checkpoint()  # no report will come for it
        return more

    def _send(self, sink: Sink, now_s: float) -> bool:
        for _ in range(_MOST_BATCHES):
            if not sink.capacity(self.stream):
                return False
            try:
                spooled = self.spool.read()
                self.error = ""
            except OSError as error:
                self.error = error.strerror or str(error)
                return False
            if spooled is None:
                return False
            try:
                sink.send(spooled.batch)
            except Exception:
                self.spool.rewind(spooled.first)
                raise
            self.in_flight.add(InFlightBatch(spooled.batch, now_s, first=spooled.first))
        return True

    def adopt(self, entry: InFlightBatch) -> None:
        """Append a batch of the ring that is in flight, without sending it a second time. Raises OSError."""
        entry.first = self.spool.end
        self.spool.append(entry.batch, self.account.ring_id, entry.position)
        self.spool.sent = self.spool.end  # all before it was sent
        self.in_flight.add(entry)

    def on_reports(self, outcome: Outcome) -> None:
        """Process delivery reports: count them, and release what is done from the spool."""
        self.account.count_reports(outcome)
        for batch, lost in outcome.done:
            self.in_flight.finish(batch, lost)
        self.acknowledge()
        self.account.checkpoint()

    def acknowledge(self) -> None:
        """Acknowledge batches that are done, in order. The next checkpoint deletes their files."""
        for entry in self.in_flight.pop_done():
            self.account.finalize_lost(entry.lost)
            self.spool.ack(entry.first, entry.first + len(entry.batch))
        self._acknowledge_rest()

    def _acknowledge_rest(self) -> bool:
        """Acknowledge the events up to the end if they could not be read; return whether there were any."""
        spool = self.spool
        if self.in_flight.oldest or not spool.acked < spool.sent == spool.end:
            return False
        spool.ack(spool.end, spool.end)
        return True
