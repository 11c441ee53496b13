"""One stream's counts, and the checkpoint that stores them and releases the events that are safe."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from producer.events import Outcome
from producer.pipeline.interfaces import Ring
from producer.pipeline.ledger import Account
from producer.spool.spool import Spool


class StreamAccount:
    """Counts a stream's events, continuing from `account`, and releases them from `ring` and `spool`.

    `delivered`, `lost` and `carried` count events: acknowledged, lost outside the kernel, and in the spool when the
    ring was created. Without a ring, its position stays as it is in `account`.
    """

    def __init__(
        self, ring: Ring | None, spool: Spool | None, write: Callable[[Account], None], account: Account
    ) -> None:
        self._ring = ring
        self._spool = spool
        self._write = write
        self._account = account
        self._lost = Counter(account.lost)
        self._final_lost = Counter(account.lost)
        """The losses that go to the ledger: of batches that are done. Others may be read again after a crash."""
        self.carried = account.carried
        self.ledger_error = ""
        """Why the account cannot be written; empty if it can."""
        # Every event before the ring's position is delivered, lost, or in the spool.
        read = ring.records_before if ring else 0
        self.delivered = read + self.carried - self._lost.total() - (spool.pending if spool else 0)

    @property
    def ring_id(self) -> str:
        """Id of the ring."""
        return self._account.ring

    @property
    def lost(self) -> Counter[str]:
        """Events lost by reason."""
        return self._lost + self._spool.lost if self._spool else self._lost.copy()

    def open(self, lost_before: Mapping[str, int]) -> None:
        """Write the first account; `lost_before` are losses from other rings, by reason."""
        self.carried += sum(lost_before.values())
        self.count_lost(lost_before)
        self._try_write(self._now(self._account.position))

    def count_reports(self, outcome: Outcome) -> None:
        """Count delivery reports. Their losses are final only when their batch is done."""
        self.delivered += outcome.delivered
        self._lost.update(outcome.lost)

    def count_lost(self, lost: Mapping[str, int]) -> None:
        """Count events as lost, for good."""
        self.count_lost_in_flight(lost)
        self.finalize_lost(lost)

    def count_lost_in_flight(self, lost: Mapping[str, int]) -> None:
        """Count losses that are not final: of events beside a batch in flight, which a crash would bring back."""
        self._lost.update(lost)

    def finalize_lost(self, lost: Mapping[str, int]) -> None:
        """Let the next checkpoint store losses that are already counted."""
        self._final_lost.update(lost)

    def checkpoint(self, position: int | None = None) -> None:
        """Store what has changed, then release the ring's events before `position`, and the spool's that are done.

        This order is the product's main invariant: first the ledger is written, then the ring's position is committed,
        then spool files are deleted. An event leaves a place only after the ledger no longer needs it there. A crash
        between two steps causes duplicates, never a loss.
        """
        account = self._now(self._account.position if position is None else position)
        if replace(account, position=self._account.position) != self._account or self.ledger_error:
            self._try_write(account)
        self._account = account
        if self._ring and position is not None:
            self._ring.commit(position)
        if self._spool and not self.ledger_error:
            self._spool.sweep()

    def _now(self, position: int) -> Account:
        lost = self._final_lost + self._spool.lost if self._spool else self._final_lost
        return replace(self._account, position=position, carried=self.carried, lost=dict(lost)).with_spool(self._spool)

    def _try_write(self, account: Account) -> None:
        try:
            self._write(account)
            self.ledger_error = ""
        except OSError as error:
            self.ledger_error = error.strerror or str(error)
