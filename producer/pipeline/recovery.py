"""Recovers a stream after a stop or a crash: ring, spool and ledger continue from one consistent state.

A crash may have come between any two steps of a move: into the spool, into the ledger, out of the ring.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from producer.errors import UnavailableError
from producer.events import Stream
from producer.pipeline.interfaces import Encoder, Ring
from producer.pipeline.ledger import Account
from producer.pipeline.ring_reader import BATCH_ROWS, RingReader
from producer.spool.spool import Spool

logger = logging.getLogger(__name__)


def resume(account: Account | None, ring_id: str, ring: Ring, spool: Spool | None) -> Account:
    """Bring ring and spool to the state that the ledger and the spool's last batch imply; return the account of it.

    `account` is the ledger's, from before `ring` was taken over or created.
    """
    if account is None or account.ring != ring_id:
        # Nothing else is known of the ring's earlier records: they were delivered, or are in the spool.
        carried = max(0, (spool.pending if spool else 0) - ring.records_before)
        return Account(ring_id, ring.position, carried).with_spool(spool)
    _skip_safe(ring, ring_id, account, spool)
    lost = Counter(account.lost)
    if spool is None:
        lost["spool_damaged"] += account.end - account.acked - account.discarded
    return Account(ring_id, ring.position, account.carried, dict(+lost)).with_spool(spool)


def resume_spool(account: Account | None, spool: Spool) -> Account:
    """Return the account of a spool that is sent without its ring, for the next producer to take both over."""
    account = account or Account()
    return replace(account, position=max(_safe_positions(account.ring, account, spool))).with_spool(spool)


def drain(
    stream: Stream,
    ring: Ring,
    ring_id: str,
    encoder: Callable[[], Encoder],
    spool: Spool | None,
    account: Account | None,
    utc_offset_ns: int,
) -> int:
    """Move the events of a replaced hook's ring into the spool; return how many are lost.

    Whatever the ring holds, the start continues. An empty `ring_id` matches neither ledger nor spool.
    """
    refused = 0
    try:
        if ring_id:
            _skip_safe(ring, ring_id, account, spool)
        if spool is None and ring.unread:
            raise UnavailableError("no spool")
        reader = RingReader(stream, ring, encoder())
        moved: int | None = 0
        failed_at = -1
        while spool and moved is not None:
            try:
                moved = _move(reader, ring, ring_id, spool, utc_offset_ns)
                refused += moved or 0
            except Exception:
                if ring.position == failed_at:
                    raise
                failed_at = ring.position  # the encoder may take fewer rows now
    except Exception as error:
        logger.error("hooks: %d events of replaced hooks lost: %s", ring.unread, error)
    return refused + ring.unread


def _move(reader: RingReader, ring: Ring, ring_id: str, spool: Spool, utc_offset_ns: int) -> int | None:
    """Move a batch into the spool; return how many of its events cannot be moved, or None at the end of the ring."""
    with reader.read(BATCH_ROWS, utc_offset_ns) as read:
        if read is None:
            return None
        if read.batch is not None:
            spool.append(read.batch, ring_id, read.position)
    ring.commit(read.position)
    return read.refused.total()


def _skip_safe(ring: Ring, ring_id: str, account: Account | None, spool: Spool | None) -> None:
    """Move the ring's position past the events that are safe.

    A position outside the ring is ignored: committing it would keep the kernel from writing to the ring.
    """
    position = max([ring.position, *filter(ring.holds, _safe_positions(ring_id, account, spool))])
    if position != ring.position:
        ring.position = position
        ring.commit(position)


def _safe_positions(ring_id: str, account: Account | None, spool: Spool | None) -> list[int]:
    """Return the ring positions before which, by the ledger or the spool, all events are done or on disk."""
    last = spool.last if spool else None
    return [each.position for each in (account, last) if each is not None and each.ring == ring_id]
