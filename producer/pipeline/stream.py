"""One stream's path from its ring to Kafka: the batches in flight, the spool, and the account.

Events keep the ring's order: the spool's come before the ring's, and the first part of each may be in flight. A batch
that is spilled while in flight stays in flight and is not sent a second time.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from producer.events import Batch, EncodedBatch, Stream
from producer.pipeline.interfaces import Encoder, Outcome, Ring, Sink, Spool, Waits
from producer.pipeline.ledger import Account
from producer.spool.format import Spooled

_BATCH_ROWS = 4096
_MOST_BATCHES = 32
"""Batches sent from the spool per step: each may be a few messages."""
_UNENCODABLE = "encode"
"""Reason of a loss: the event cannot be encoded."""
_DAMAGED = "ring_damaged"
"""Reason of a loss: the event's record in the ring is damaged."""
_FULL = 0.5
"""Share of a ring that may fill before spilling starts while the sink has no capacity."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A batch in flight."""

    batch: EncodedBatch
    sent_at: float
    oldest_ns: int
    """Kernel time of its first row; 0 if it was read from the spool."""
    position: int = 0
    """Ring position after it, if it is not in the spool."""
    first: int = 0
    """Number of its first event in the spool, if it is there."""
    done: bool = False
    lost: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """Events next to it in the ring that cannot be sent, by reason."""


@dataclass(frozen=True, slots=True)
class _Read:
    """The result of a read from the ring: a batch, unless none of the records could be encoded."""

    batch: EncodedBatch | None
    oldest_ns: int
    refused: Counter[str]
    """Events that are not in the batch, by reason."""
    more: bool
    """Whether the ring likely has more."""


@dataclass(frozen=True, slots=True)
class Stores:
    """What outlives the process: the spool, if there is one, and the account that `write_account` stores."""

    spool: Spool | None
    write_account: Callable[[Account], None]
    waits: Waits
    spill_after_s: float
    """Seconds that a batch may be in flight before spilling starts."""


class StreamPath:
    """One stream's path and its account, which continues from `account`.

    `delivered`, `lost` and `carried` count events: acknowledged, lost outside the kernel, and in the spool when the
    ring was created.
    """

    def __init__(self, stream: Stream, ring: Ring, encoder: Encoder, stores: Stores, account: Account) -> None:
        self.stream = stream
        self._ring = ring
        self._encoder = encoder
        self._stores = stores
        self._spool = stores.spool
        self._account = account
        self._lost = Counter(account.lost)
        self._ledger_lost = Counter(account.lost)
        """The losses that go to the ledger: of batches that are done. Others may be read again after a crash."""
        self._carried = account.carried
        self._from_spool: deque[_Entry] = deque()
        self._from_ring: deque[_Entry] = deque()
        self._entries: dict[EncodedBatch, _Entry] = {}
        self._append_at = 0.0
        self._spooling = self._spool is not None and self._spool.sent < self._spool.end
        self.spool_error = ""
        """Why the spool cannot be written or read; empty if it can."""
        self.ledger_error = ""
        """Why the account cannot be written; empty if it can."""
        # Every event before the ring's position is delivered, lost, or in the spool.
        self.delivered = ring.records_before + self._carried - self._lost.total() - self._pending()

    @property
    def spooling(self) -> bool:
        """Whether events go through the spool."""
        return self._spooling

    @property
    def lost(self) -> Counter[str]:
        """Events lost by reason."""
        return self._lost + self._spool.lost if self._spool else self._lost.copy()

    @property
    def carried(self) -> int:
        """Events in the spool when the ring was created."""
        return self._carried

    @property
    def taken(self) -> int:
        """Events read from the ring since it was created."""
        return self._ring.records_before

    @property
    def spooled(self) -> int:
        """Events in the spool that are not in flight."""
        return self._pending() - sum(len(entry.batch) for entry in self._from_spool)

    def step(self, sink: Sink, now_s: float, utc_offset_ns: int) -> bool:
        """Send or spill the next events; return whether there are likely more."""
        if not self._spooling and self._is_stuck(sink, now_s):
            self._spooling = True
        if not self._spooling:
            return self._send(sink, now_s, utc_offset_ns)
        more = self._spill(now_s, utc_offset_ns)
        more |= self._send_spooled(sink, now_s)
        assert self._spool is not None
        if self._spool.acked < self._spool.sent == self._spool.end and not self._from_spool:
            self.checkpoint(None)  # the rest could not be read, so no report will come for it
        self._spooling = self._spool.sent < self._spool.end or self._is_overdue(now_s)
        if not self._spooling:
            self._spool_recovered()
        return more

    def on_reports(self, outcome: Outcome) -> list[tuple[int, int]]:
        """Process delivery reports: count, and release from ring and spool what is done.

        Return the kernel time of the first event and the number of events of each batch from the ring that is done.
        """
        self.delivered += outcome.delivered
        self._lost.update(outcome.lost)
        done = []
        for batch, lost in outcome.done:
            entry = self._entries.pop(batch)
            entry.done, entry.lost = True, lost
            done.append(entry)
        position = None
        while self._from_ring and self._from_ring[0].done:
            position = self._leave_ring()
        while self._spool and self._from_spool and self._from_spool[0].done:
            entry = self._from_spool.popleft()
            self._ledger_lost.update(entry.lost)
            self._spool.ack(entry.first, entry.first + len(entry.batch))
        self.checkpoint(position)
        return [(entry.oldest_ns, len(entry.batch)) for entry in done if entry.oldest_ns]

    def spill_all(self, now_s: float, utc_offset_ns: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Spill the batches in flight and the ring's events, as far as the spool takes them, until `is_over`."""
        if self._spool is None:
            return
        self._spooling = True
        self._append_at = 0.0
        while self._spill(now_s, utc_offset_ns) and not is_over():
            pass

    def end(self, sink: Sink, unread: int, *, ring_stays: bool) -> tuple[int, int]:
        """Account for what is still in flight. Call this once, before the sink is closed.

        Return the number of events left in the spool and in the ring, including `unread`. If the ring does not stay,
        the events in it are lost.
        """
        spooled = self.spooled + sum(sink.unacknowledged(entry.batch) for entry in self._from_spool)
        in_ring = unread + sum(sink.unacknowledged(entry.batch) for entry in self._from_ring)
        if not ring_stays and in_ring:
            self.count_lost("stopped", in_ring)
            in_ring = 0
        self.checkpoint(None)
        return spooled, in_ring

    def open(self, lost_before: Mapping[str, int]) -> None:
        """Write the first account; `lost_before` are losses from other rings, by reason."""
        for reason, count in lost_before.items():
            self._carried += count
            self.count_lost(reason, count)
        self._write(self._account_now(self._account.position))

    def count_lost(self, reason: str, count: int) -> None:
        """Count events as lost, for good."""
        self._lost[reason] += count
        self._ledger_lost[reason] += count

    def _pending(self) -> int:
        return self._spool.end - self._spool.acked - self._spool.discarded if self._spool else 0

    def _is_overdue(self, now_s: float) -> bool:
        """Whether the oldest batch has been in flight for too long."""
        oldest = self._from_spool[0] if self._from_spool else self._from_ring[0] if self._from_ring else None
        return oldest is not None and now_s - oldest.sent_at > self._stores.spill_after_s

    def _is_stuck(self, sink: Sink, now_s: float) -> bool:
        if self._spool is None or now_s < self._append_at:
            return False
        return self._is_overdue(now_s) or (self._ring.fill > _FULL and not sink.capacity(self.stream))

    def _next_batch(self, limit: int, utc_offset_ns: int) -> _Read | None:
        before = self._ring.position
        rows = self._ring.read(limit)
        if is_cut := len(rows) > 0 and (fit := self._encoder.fit(rows)) < len(rows):
            self._ring.position = before
            rows = self._ring.read(fit)
        damaged = self._ring.damaged
        if not len(rows) and not damaged:
            return None
        more = is_cut or len(rows) + damaged == _BATCH_ROWS
        if not len(rows):
            return _Read(None, 0, Counter({_DAMAGED: damaged}), more)
        oldest_ns = int(rows["s"]["ts"][0])
        batch = self._encoder.encode(Batch(self.stream, rows), utc_offset_ns)
        refused = +Counter({_UNENCODABLE: len(rows) - len(batch or ()), _DAMAGED: damaged})
        return _Read(batch, oldest_ns, refused, more)

    def _send(self, sink: Sink, now_s: float, utc_offset_ns: int) -> bool:
        before = self._ring.position
        try:
            read = self._next_batch(min(sink.capacity(self.stream), _BATCH_ROWS), utc_offset_ns)
            if read is None:
                return False
            if read.batch is None:
                self._skip(read.refused)
            else:
                sink.send(read.batch)
                self._begin(read.batch, read, now_s)
        except Exception:
            self._ring.position = before  # another step reads it again
            raise
        return read.more

    def _begin(self, batch: EncodedBatch, read: _Read, now_s: float) -> None:
        self._lost.update(read.refused)
        position = self._ring.position
        entry = _Entry(batch, now_s, read.oldest_ns, position=position, refused=read.refused)
        self._entries[batch] = entry
        self._from_ring.append(entry)

    def _skip(self, refused: Counter[str]) -> None:
        """Skip records that cannot be sent: together with the batch before them, if one is in flight."""
        self._lost.update(refused)
        if self._from_ring:
            self._from_ring[-1].refused.update(refused)
            self._from_ring[-1].position = self._ring.position
        else:
            self._ledger_lost.update(refused)
            self.checkpoint(self._ring.position)

    def _spill(self, now_s: float, utc_offset_ns: int) -> bool:
        """Spill the batches in flight, then one from the ring; return whether the ring likely has more."""
        assert self._spool is not None
        if now_s < self._append_at:
            return False
        before, position, found = self._ring.position, None, None
        try:
            while self._from_ring:
                entry = self._from_ring[0]
                if entry.done:
                    position = self._leave_ring()
                    continue
                entry.first = self._spool.end
                self._spool.append(entry.batch, self._account.ring, entry.position)
                self._spool.sent = self._spool.end  # all before it was sent
                self._from_spool.append(self._from_ring.popleft())
                self._ledger_lost.update(entry.refused)
                position = entry.position
            found = self._next_batch(_BATCH_ROWS, utc_offset_ns)
            if found:
                if found.batch is not None:
                    self._spool.append(found.batch, self._account.ring, self._ring.position)
                self._lost.update(found.refused)
                self._ledger_lost.update(found.refused)
                position = self._ring.position
            if position is not None:
                self._spool_recovered()
        except OSError as error:
            self._ring.position = before
            found = None
            self._append_at = now_s + self._stores.waits.next()
            self.spool_error = error.strerror or str(error)
        self.checkpoint(position)
        return found is not None and found.more

    def _spool_recovered(self) -> None:
        """Clear the spool's error: a write succeeded, or the spool is not needed."""
        if self.spool_error:
            self.spool_error, self._append_at = "", 0.0
            self._stores.waits.reset()

    def _leave_ring(self) -> int:
        """Remove the first batch from the ring, which is done; return the position after it."""
        entry = self._from_ring.popleft()
        self._ledger_lost.update(entry.lost + entry.refused)
        return entry.position

    def _send_spooled(self, sink: Sink, now_s: float) -> bool:
        assert self._spool is not None
        for _ in range(_MOST_BATCHES):
            if not sink.capacity(self.stream):
                return False
            try:
                spooled = self._spool.read()
            except OSError as error:
                self.spool_error = error.strerror or str(error)
                return False
            if spooled is None:
                return False
            entry = self._entries[spooled.batch] = _Entry(spooled.batch, now_s, 0, first=spooled.first)
            self._from_spool.append(entry)
            sink.send(spooled.batch)
        return True

    def _account_now(self, position: int) -> Account:
        spool = self._spool
        lost = dict(self._ledger_lost + spool.lost if spool else self._ledger_lost)
        place = (spool.acked, spool.end, spool.discarded) if spool else ()
        return Account(self._account.ring, position, self._carried, lost, *place)

    def _write(self, account: Account) -> None:
        try:
            self._stores.write_account(account)
            self.ledger_error = ""
        except OSError as error:
            self.ledger_error = error.strerror or str(error)

    def checkpoint(self, position: int | None) -> None:
        """Record what has changed, then release it from the ring up to `position`, and from the spool.

        This order is the product's main invariant: first the ledger is written, then the ring's position is committed,
        then spool files are deleted. An event leaves a place only after the ledger no longer needs it there. A crash
        between two steps causes duplicates, never a loss.
        """
        spool = self._spool
        if spool and not self._from_spool and spool.sent == spool.end > spool.acked:
            spool.ack(spool.end, spool.end)  # the rest could not be read
        account = self._account_now(self._account.position if position is None else position)
        if replace(account, position=self._account.position) != self._account or self.ledger_error:
            self._write(account)
        self._account = account
        if position is not None:
            self._ring.commit(position)
        if spool and not self.ledger_error:
            spool.sweep()


def resume(account: Account | None, ring_id: str, ring: Ring, spool: Spool | None, last: Spooled | None) -> Account:
    """Recover ring, spool and ledger to one consistent state, and return the account to continue from.

    `account` is the ledger's, from before `ring` was taken over or created; `last` is the last batch in the spool. A
    crash may have come between any two steps of a move: into the spool, into the ledger, out of the ring.
    """
    waiting = spool.end - spool.acked - spool.discarded if spool else 0
    place = (spool.acked, spool.end, spool.discarded) if spool else ()
    if account is None or account.ring != ring_id:
        # Nothing else is known of the ring's earlier records: they were delivered, or are in the spool.
        return Account(ring_id, ring.position, max(0, waiting - ring.records_before), {}, *place)
    known = [account.position, last.position if last is not None and last.ring == ring_id else 0]
    # Committing a position outside the ring would keep the kernel from writing to it.
    position = max([ring.position, *filter(ring.holds, known)])
    if position != ring.position:
        ring.position = position
        ring.commit(position)
    lost = Counter(account.lost)
    if spool is None:
        lost["spool_damaged"] += account.end - account.acked - account.discarded
    return Account(ring_id, position, account.carried, dict(+lost), *place)
