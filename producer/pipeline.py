"""The way of the data, for all streams: rows out of a ring, encoded, sent to Kafka or put on disk, and the ring's room
given back once they are safe.

The ring is the log: a batch's room goes back to the kernel only when Kafka has acknowledged (or finally refused) every
message of it and of all before it, or when it is in the spool. So what waits for Kafka waits in one order: first what
is in the spool, then what is in the ring; a window of that is under way to Kafka. While Kafka takes what it is sent,
the spool is empty and nothing is written. When it does not, the spool takes what is under way and then what comes; what
is new is sent behind what is in the spool until that is empty. Where the spool takes nothing either (a full disk),
events stay in the ring, and when that is full, the kernel counts what it cannot take. Nothing else is buffered, and
nothing waits.

One thread calls `step` in a loop. Nothing here opens a file or reads a clock but through what it is given.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from producer.events import Batch, EncodedBatch, Rows, Stream
from producer.ledger import Account
from producer.segment import Spooled

_BATCH_ROWS = 4096
_MOST_BATCHES = 32
"""Batches from the spool in one step: each may be a few messages."""
_FULL = 0.5
"""Share of a ring that may fill before the spool takes over from a Kafka that has no room."""


class Ring(Protocol):
    """What the pipeline asks of a ring."""

    position: int
    """Behind the last row read."""

    @property
    def records_before(self) -> int:
        """Number of rows before `position` since the ring was made."""

    @property
    def fill(self) -> float:
        """Share of the ring that is taken."""

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
    def done(self) -> Sequence[tuple[EncodedBatch, Counter[str]]]:
        """Batches with no message left in flight, and what each has lost."""


class Sink(Protocol):
    """What the pipeline asks of a sink."""

    def room(self, stream: Stream) -> int:
        """Return how many messages of a stream may be sent now."""

    def send(self, batch: EncodedBatch) -> None:
        """Queue a batch; it may be larger than the room that there is."""

    def poll(self) -> Mapping[str, Outcome]:
        """Return what became of messages since the last call, by stream."""

    def left(self, batch: EncodedBatch) -> int:
        """Return how many messages of a batch are still under way."""


class Spool(Protocol):
    """What the pipeline asks of a spool: producer.spool says what its numbers are."""

    acked: int
    sent: int
    end: int
    gone: int
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


@dataclass(slots=True, eq=False)
class _Entry:
    """A batch under way."""

    batch: EncodedBatch
    sent_at: float
    oldest_ns: int
    """Kernel's time of its first row; 0 for what was read from the spool."""
    position: int = 0
    """Ring position behind it, if it is not in the spool."""
    first: int = 0
    """Its first number in the spool, if it is there."""
    done: bool = False
    lost: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Stores:
    """Where a path keeps what outlives the process: a spool, if there is one, and what `write_account` writes."""

    spool: Spool | None
    write_account: Callable[[Account], None]
    waits: Waits
    after_s: float
    """Seconds that a batch may be under way before Kafka counts as not taking it."""


class Path:
    """One stream's way, and its account, which goes on from `account`.

    `delivered`, `lost` and `carried` count events: acknowledged, lost for reasons other than the kernel's, and those
    that the spool held when the ring was made.
    """

    def __init__(self, stream: Stream, ring: Ring, encoder: Encoder, stores: Stores, account: Account) -> None:
        self.stream = stream
        self._ring = ring
        self._encoder = encoder
        self._stores = stores
        self._spool = stores.spool
        self._account = account
        self._lost = Counter(account.lost)
        self._settled = Counter(account.lost)
        """What is lost of events that are done: those of a batch in part under way may come again after a crash."""
        self._carried = account.carried
        self._from_spool: deque[_Entry] = deque()
        self._from_ring: deque[_Entry] = deque()
        self._entries: dict[EncodedBatch, _Entry] = {}
        self._append_at = 0.0
        self._spooling = self._spool is not None and self._spool.sent < self._spool.end
        self.spool_trouble = ""
        """Why the spool takes nothing."""
        self.ledger_trouble = ""
        """Why the account cannot be written."""
        # What is behind the ring's position was delivered, or lost, or is in the spool.
        self.delivered = ring.records_before + self._carried - self._lost.total() - self._waiting()

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
        """Events that the spool held when the ring was made."""
        return self._carried

    @property
    def taken(self) -> int:
        """Events taken out of the ring since it was made."""
        return self._ring.records_before

    @property
    def spooled(self) -> int:
        """Events in the spool that are not under way."""
        return self._waiting() - sum(len(entry.batch) for entry in self._from_spool)

    def step(self, sink: Sink, now_s: float, utc_offset_ns: int) -> bool:
        """Move events on; return whether more is likely to wait."""
        if not self._spooling and self._is_stuck(sink, now_s):
            self._spooling = True
        if not self._spooling:
            return self._send(sink, now_s, utc_offset_ns)
        more = self._put_by(now_s, utc_offset_ns)
        more |= self._send_spooled(sink, now_s)
        assert self._spool is not None
        if self._spool.acked < self._spool.sent == self._spool.end and not self._from_spool:
            self._close_books(None)  # what was left could not be read: no report will come for it
        self._spooling = self._spool.sent < self._spool.end or self._waited(now_s)
        if not self._spooling:
            self._spool_works()
        return more

    def settle(self, outcome: Outcome) -> list[tuple[int, int]]:
        """Take account of delivery reports: give back the ring's room, and what the spool holds, as far as it is done.

        Return, for each batch from the ring that is done, the kernel's time of its first event and how many it has.
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
            self._settled.update(entry.lost)
            self._spool.ack(entry.first, entry.first + len(entry.batch))
        self._close_books(position)
        return [(entry.oldest_ns, len(entry.batch)) for entry in done if entry.oldest_ns]

    def put_all_by(self, now_s: float, utc_offset_ns: int) -> bool:
        """Put what is under way, and what the ring holds, into the spool; return whether it took all."""
        if self._spool is None:
            return False
        self._spooling = True
        self._append_at = 0.0
        while self._put_by(now_s, utc_offset_ns):
            pass
        return not self.spool_trouble

    def end(self, sink: Sink, unread: int, *, ring_stays: bool) -> tuple[int, int]:
        """End with what is still under way: nobody will send it. Call it once, before the sink is closed.

        Return the events that are left in the spool, and in the ring, `unread` among them: where that does not stay,
        they are lost.
        """
        spooled = self.spooled + sum(sink.left(entry.batch) for entry in self._from_spool)
        in_ring = unread + sum(sink.left(entry.batch) for entry in self._from_ring)
        if not ring_stays and in_ring:
            self.lose("stopped", in_ring)
            in_ring = 0
        self._close_books(None)
        return spooled, in_ring

    def open(self, lost_before: Mapping[str, int]) -> None:
        """Write down the account that this begins with; `lost_before` are events of other rings, by reason."""
        for reason, count in lost_before.items():
            self._carried += count
            self.lose(reason, count)
        self._write(self._account_now(self._account.position))

    def lose(self, reason: str, count: int) -> None:
        """Count events that are lost for another reason."""
        self._lost[reason] += count
        self._settled[reason] += count

    def _waiting(self) -> int:
        return self._spool.end - self._spool.acked - self._spool.gone if self._spool else 0

    def _waited(self, now_s: float) -> bool:
        """Say whether Kafka has not taken the oldest batch under way for too long."""
        oldest = self._from_spool[0] if self._from_spool else self._from_ring[0] if self._from_ring else None
        return oldest is not None and now_s - oldest.sent_at > self._stores.after_s

    def _is_stuck(self, sink: Sink, now_s: float) -> bool:
        if self._spool is None or now_s < self._append_at:
            return False
        return self._waited(now_s) or (self._ring.fill > _FULL and not sink.room(self.stream))

    def _next_batch(self, limit: int, utc_offset_ns: int) -> tuple[EncodedBatch, int] | None:
        rows = self._ring.read(limit)
        if not len(rows):
            return None
        oldest_ns = int(rows["s"]["ts"][0])
        return self._encoder.encode(Batch(self.stream, rows), utc_offset_ns), oldest_ns

    def _send(self, sink: Sink, now_s: float, utc_offset_ns: int) -> bool:
        found = self._next_batch(min(sink.room(self.stream), _BATCH_ROWS), utc_offset_ns)
        if found is None:
            return False
        batch, oldest_ns = found
        entry = self._entries[batch] = _Entry(batch, now_s, oldest_ns, position=self._ring.position)
        self._from_ring.append(entry)
        sink.send(batch)
        return len(batch) == _BATCH_ROWS

    def _put_by(self, now_s: float, utc_offset_ns: int) -> bool:
        """Put what is under way, and then a batch of the ring, into the spool; return whether more is likely there."""
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
                self._spool.sent = self._spool.end  # nothing was there that had not been sent
                self._from_spool.append(self._from_ring.popleft())
                position = entry.position
            found = self._next_batch(_BATCH_ROWS, utc_offset_ns)
            if found:
                self._spool.append(found[0], self._account.ring, self._ring.position)
                position = self._ring.position
            if position is not None:
                self._spool_works()
        except OSError as error:
            self._ring.position = before
            found = None
            self._append_at = now_s + self._stores.waits.next()
            self.spool_trouble = error.strerror or str(error)
        self._close_books(position)
        return found is not None and len(found[0]) == _BATCH_ROWS

    def _spool_works(self) -> None:
        """Note that the spool takes what it should, or is not needed."""
        if self.spool_trouble:
            self.spool_trouble, self._append_at = "", 0.0
            self._stores.waits.reset()

    def _leave_ring(self) -> int:
        """Take the first batch from the ring, which is done, out of the account; return the position behind it."""
        entry = self._from_ring.popleft()
        self._settled.update(entry.lost)
        return entry.position

    def _send_spooled(self, sink: Sink, now_s: float) -> bool:
        assert self._spool is not None
        for _ in range(_MOST_BATCHES):
            if not sink.room(self.stream):
                return False
            spooled = self._spool.read()
            if spooled is None:
                return False
            entry = self._entries[spooled.batch] = _Entry(spooled.batch, now_s, 0, first=spooled.first)
            self._from_spool.append(entry)
            sink.send(spooled.batch)
        return True

    def _account_now(self, position: int) -> Account:
        spool = self._spool
        lost = dict(self._settled + spool.lost if spool else self._settled)
        place = (spool.acked, spool.end, spool.gone) if spool else ()
        return Account(self._account.ring, position, self._carried, lost, *place)

    def _write(self, account: Account) -> None:
        try:
            self._stores.write_account(account)
            self.ledger_trouble = ""
        except OSError as error:
            self.ledger_trouble = error.strerror or str(error)

    def _close_books(self, position: int | None) -> None:
        """Write down what has changed, and only then give back the ring's room and delete files."""
        spool = self._spool
        if spool and not self._from_spool and spool.sent == spool.end > spool.acked:
            spool.ack(spool.end, spool.end)  # what is left could not be read
        account = self._account_now(self._account.position if position is None else position)
        if replace(account, position=self._account.position) != self._account or self.ledger_trouble:
            self._write(account)
        self._account = account
        if position is not None:
            self._ring.commit(position)
        if spool and not self.ledger_trouble:
            spool.sweep()


def resume(account: Account | None, ring_id: str, ring: Ring, spool: Spool | None, last: Spooled | None) -> Account:
    """Bring ring, spool and ledger to one state, and return the account that a path goes on from.

    `account` is what the ledger said before `ring` was taken over, or before it was made; `last` is the last batch in
    the spool. A crash may have come between the steps of a move: into the spool, into the ledger, out of the ring.
    """
    waiting = spool.end - spool.acked - spool.gone if spool else 0
    place = (spool.acked, spool.end, spool.gone) if spool else ()
    if account is None or account.ring != ring_id:
        # Where a ring has records from before, nothing else is known of them: they were delivered, or wait.
        return Account(ring_id, ring.position, max(0, waiting - ring.records_before), {}, *place)
    position = max(ring.position, account.position)
    if last is not None and last.ring == ring_id:
        position = max(position, last.position)
    if position != ring.position:
        ring.position = position
        ring.commit(position)
    lost = Counter(account.lost)
    if spool is None:
        lost["spool_damaged"] += account.end - account.acked - account.gone
    return Account(ring_id, position, account.carried, dict(+lost), *place)


class Pipeline:
    """Moves events of all `paths` to `sink`.

    `now_s` returns the monotonic clock's seconds, `utc_offset_ns` what it lacks to UTC; `delivered` is told how long
    a batch took from the kernel to its acknowledgement, in seconds, and how many events it has.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        sink: Sink,
        now_s: Callable[[], float],
        utc_offset_ns: Callable[[], int],
        delivered: Callable[[float, int], None] = lambda seconds, count: None,
    ) -> None:
        self._paths = {path.stream.name: path for path in paths}
        self._sink = sink
        self._now_s = now_s
        self._utc_offset_ns = utc_offset_ns
        self._delivered = delivered

    def step(self) -> bool:
        """Move events on, and take account of delivery reports. Return whether more is likely to wait."""
        more = False
        for path in self._paths.values():
            more |= path.step(self._sink, self._now_s(), self._utc_offset_ns())
        self.settle()
        return more

    def settle(self) -> None:
        """Take account of delivery reports."""
        for name, outcome in self._sink.poll().items():
            for oldest_ns, count in self._paths[name].settle(outcome):
                self._delivered(self._now_s() - oldest_ns / 1e9, count)

    def put_all_by(self) -> bool:
        """Put all that is not acknowledged into the spools; return whether these took it."""
        took = [path.put_all_by(self._now_s(), self._utc_offset_ns()) for path in self._paths.values()]
        return all(took)
