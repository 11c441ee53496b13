"""One stream's path from its ring to Kafka or the spool, and the acknowledgements back.

Events keep the ring's order: the spool's come before the ring's, and the first part of each may be in flight. A batch
that is spilled while in flight stays in flight and is not sent a second time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from producer.events import Outcome, Rows, Stream
from producer.pipeline.account import StreamAccount
from producer.pipeline.in_flight import InFlightBatch, InFlightBatches
from producer.pipeline.interfaces import Encoder, Ring, Sink, Waits
from producer.pipeline.ledger import Account
from producer.pipeline.ring_reader import BATCH_ROWS, RingReader
from producer.pipeline.spool_sender import SpoolSender
from producer.spool.spool import Spool

_FULL = 0.5
"""Share of a ring that may fill before spilling starts while the sink has no capacity."""


@dataclass(frozen=True, slots=True)
class Stores:
    """What outlives the process: the spool, if there is one, and the account that `write_account` stores."""

    spool: Spool | None
    write_account: Callable[[Account], None]
    waits: Waits
    spill_after_s: float
    """Seconds that a batch may be in flight before spilling starts."""


class StreamPipeline:
    """Composes a stream's RingReader, its SpoolSender if there is a spool, and its StreamAccount, from `account` on.

    `count` gets the rows of each batch once, after it was sent or spilled.
    """

    def __init__(
        self,
        stream: Stream,
        ring: Ring,
        encoder: Encoder,
        stores: Stores,
        account: Account,
        count: Callable[[Rows], None] | None = None,
    ) -> None:
        self.stream = stream
        self.account = StreamAccount(ring, stores.spool, stores.write_account, account)
        self._ring = ring
        self._reader = RingReader(stream, ring, encoder, count)
        self._sender = SpoolSender(stream, stores.spool, self.account) if stores.spool else None
        self._waits = stores.waits
        self.spill_after_s = stores.spill_after_s
        self._in_flight = InFlightBatches()
        """The batches in flight that are in the ring."""
        self._spill_at_s = 0.0
        self._spill_error = ""
        self.spooling = self._sender is not None and self._sender.has_unsent
        """Whether events go through the spool."""

    @property
    def spool_error(self) -> str:
        """Why the spool cannot be written or read; empty if it can."""
        return self._spill_error or (self._sender.error if self._sender else "")

    @property
    def unread_share(self) -> float:
        """Share of the ring that unread events use."""
        return self._ring.unread_share

    @property
    def oldest_sent_s(self) -> float | None:
        """When the oldest batch in flight was sent; None if none is in flight."""
        oldest = (self._sender.in_flight.oldest if self._sender else None) or self._in_flight.oldest
        return oldest.sent_at_s if oldest else None

    @property
    def taken(self) -> int:
        """Events read from the ring since it was created."""
        return self._ring.records_before

    @property
    def request_rows(self) -> int:
        """Events that fit into one produce request."""
        return self._reader.request_rows

    @property
    def spooled(self) -> int:
        """Events in the spool that are not in flight."""
        return self._sender.waiting if self._sender else 0

    def step(self, sink: Sink, now_s: float, utc_offset_ns: int) -> bool:
        """Send or spill the next events; return whether there are likely more."""
        if self._sender is None or not (self.spooling or self._is_stuck(sink, now_s)):
            return self._send(sink, now_s, utc_offset_ns)
        self.spooling = True
        more = self._spill(self._sender, now_s, utc_offset_ns)
        more |= self._sender.send(sink, now_s)
        self.spooling = self._sender.has_unsent or self._is_overdue(now_s)
        if not self.spooling:
            self._spill_recovered()
        return more

    def on_reports(self, outcome: Outcome) -> list[tuple[int, int]]:
        """Process delivery reports: count, and release from ring and spool what is done.

        Return the kernel time of the first event and the number of events of each batch from the ring that is done.
        """
        self.account.count_reports(outcome)
        in_flight = [self._in_flight, self._sender.in_flight] if self._sender else [self._in_flight]
        done = [entry for batch, lost in outcome.done for each in in_flight if (entry := each.finish(batch, lost))]
        position = None
        for entry in self._in_flight.pop_done():
            position = self._leave_ring(entry)
        if self._sender:
            self._sender.acknowledge()
        self.account.checkpoint(position)
        return [(entry.oldest_ns, len(entry.batch)) for entry in done if entry.oldest_ns]

    def spill_all(self, now_s: float, utc_offset_ns: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Spill the batches in flight and the ring's events, as far as the spool takes them, until `is_over`."""
        if self._sender is None:
            return
        self.spooling = True
        self._spill_at_s = 0.0
        more, failed_at = True, -1
        while more and not is_over():
            try:
                more = self._spill(self._sender, now_s, utc_offset_ns)
            except Exception:
                if self._ring.position == failed_at:
                    raise
                failed_at = self._ring.position  # the encoder may take fewer rows now

    def end(self, sink: Sink, unread: int, *, ring_stays: bool) -> tuple[int, int]:
        """Account for what is still in flight. Call this once, before the sink is closed.

        Return the number of events left in the spool and in the ring, including `unread`. If the ring does not stay,
        the events in it are lost.
        """
        spooled, in_ring = self.spooled, unread
        in_ring += sum(sink.unacknowledged(entry.batch) for entry in self._in_flight)
        if self._sender:
            spooled += sum(sink.unacknowledged(entry.batch) for entry in self._sender.in_flight)
        if not ring_stays and in_ring:
            self.account.count_lost({"stopped": in_ring})
            in_ring = 0
        self.account.checkpoint()
        return spooled, in_ring

    def is_stalled(self, sink: Sink, now_s: float) -> bool:
        """Whether events wait for acknowledgements, so that a step may do something at any time."""
        return self.spooling or self._is_overdue(now_s) or not sink.capacity(self.stream)

    def _is_overdue(self, now_s: float) -> bool:
        """Whether the oldest batch has been in flight for too long."""
        sent_s = self.oldest_sent_s
        return sent_s is not None and now_s - sent_s > self.spill_after_s

    def _is_stuck(self, sink: Sink, now_s: float) -> bool:
        if now_s < self._spill_at_s:
            return False
        return self._is_overdue(now_s) or (self._ring.fill > _FULL and not sink.capacity(self.stream))

    def _send(self, sink: Sink, now_s: float, utc_offset_ns: int) -> bool:
        with self._reader.read(min(sink.capacity(self.stream), self.request_rows), utc_offset_ns) as read:
            if read is None:
                return False
            if read.batch is None:
                self._skip(read.position, read.refused)
            else:
                sink.send(read.batch)
                self.account.count_lost_in_flight(read.refused)
                self._in_flight.add(
                    InFlightBatch(read.batch, now_s, read.oldest_ns, read.position, refused=read.refused)
                )
        return read.more

    def _skip(self, position: int, refused: Counter[str]) -> None:
        """Skip records that cannot be sent: together with the batch before them, if one is in flight."""
        if newest := self._in_flight.newest:
            self.account.count_lost_in_flight(refused)
            newest.refused.update(refused)
            newest.position = position
        else:
            self.account.count_lost(refused)
            self.account.checkpoint(position)

    def _spill(self, sender: SpoolSender, now_s: float, utc_offset_ns: int) -> bool:
        """Spill the batches in flight, then one from the ring; return whether the ring likely has more."""
        if now_s < self._spill_at_s:
            return False
        position, more = None, False
        try:
            while entry := self._in_flight.oldest:
                if not entry.done:
                    sender.adopt(entry)
                position = self._leave_ring(self._in_flight.pop())
            with self._reader.read(BATCH_ROWS, utc_offset_ns) as read:
                if read and read.batch is not None:
                    sender.spool.append(read.batch, self.account.ring_id, read.position)
            if read:
                self.account.count_lost(read.refused)
                position, more = read.position, read.more
            if position is not None:
                self._spill_recovered()
        except OSError as error:
            self._spill_at_s = now_s + self._waits.next()
            self._spill_error = error.strerror or str(error)
        self.account.checkpoint(position)
        return more

    def _spill_recovered(self) -> None:
        """Clear the error of writing: a write succeeded, or the spool is not needed."""
        if self._spill_error:
            self._spill_error, self._spill_at_s = "", 0.0
            self._waits.reset()

    def _leave_ring(self, entry: InFlightBatch) -> int:
        """Let the losses of a batch that leaves the ring be final; return the position after it."""
        self.account.finalize_lost(entry.lost + entry.refused)
        return entry.position
