"""What each connection did from one of its records to the next.

Records have the kernel's counters since the connection began, so a record adds the difference to those before it, and a
lost record loses nothing but its moment. A connection that began after `floor_ns`, the time from which all records are
known, counts from its beginning, and an older one from its first record. Records may repeat or be out of order: what is
not above the highest counters so far counts nothing. Counters of 32 bits wrap.

The kernel counts retransmissions, and the producer's programs their causes: after a restart, other programs begin again
at 0, and have an open connection's earlier retransmissions in `retrans_other`. So a cause that has fallen counts in
full, and what is left of the growth of `total_retrans`, if it is among the counters, is that of `retrans_other`.

Memory is bounded: `floor_ns` rises to the last record of an open connection that is dropped, so that none counts twice.
Without room for it, a connection counts when it closes. The loop over records is in native/connections.c.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer import _native
from producer.events import CAUSES, FLOWS, Ints, Mask, Rows

Bytes = NDArray[np.uint8]

_SEED = int.from_bytes(os.urandom(8))
"""Makes hashes unpredictable: a writer must not be able to make keys collide."""
_KEY, _LAST_NS, _STATE, _ENTRY_WORDS = range(4)
_CLOSES, _COUNTS = 1, 2
_FRESH, _OPENED, _CLOSED = 1, 2, 4
_RECORD_WORDS, _RESULT_WORDS = 4, 3
_NARROW, _WIDE, _RESTARTS = range(3)
_TOTAL, _OTHER = "total_retrans", "retrans_other"
_SENT, _SYN_ACKS = "segs_out", "retrans_syn_ack"
_PARTS = frozenset(f"retrans_{cause}" for cause in CAUSES) - {_OTHER}
_FIRST_ENTRIES = 1 << 10
_CHUNK = 1 << 16
_MOST_NS = (1 << 63) - 1
_FACTOR = np.int64(0x1E3779B97F4A7C15)
GIVEN_UP = "closed"
"""The error of a failed connect that has none: its process closed the socket."""


def _kind(name: str) -> int:
    """Return the kind of a counter: see native/connections.h."""
    return _RESTARTS if name in _PARTS else _WIDE if FLOWS.dtype[name].itemsize > 4 else _NARROW


def row_hashes(columns: Sequence[Ints]) -> Ints:
    """Return a hash of each row. Unpredictable if one of the columns is."""
    total = columns[0].copy()
    for column in columns[1:]:
        total = (total ^ total >> 29) * _FACTOR + column
    return (total ^ total >> 32) * _FACTOR


def connection_keys(host: Ints, boot: Ints, netns: Ints, cookie: Ints, has_cookie: Mask, ends: Sequence[Ints]) -> Ints:
    """Return a key for each record, from hashes of texts; `ends`, addresses and ports, for those without a cookie."""
    return row_hashes([host, boot, netns, np.where(has_cookie, cookie, row_hashes(ends))])


def service_port(sport: Ints, dport: Ints) -> Ints:
    """Return the lower port of each connection, nearly always the service's; a sport of 0 is none."""
    return np.where(sport > 0, np.minimum(sport, dport), dport)


class Growth(NamedTuple):
    """What records add, by record."""

    slots: Ints
    """The connection's number in the table; -1 if there is no room for it."""
    counts: Ints
    """A row for each record, and a column for each counter."""
    elapsed_ns: Ints
    """Time in which that happened: since the connection's record before, or since it began."""
    fresh: Mask
    """Whether it is later than the connection's records before."""
    opened: Mask
    """Whether it is the first of a connection that counts from its beginning."""
    closed: Mask
    """Whether it is the connection's first closing record."""

    def select(self, chosen: Mask) -> "Growth":
        """Return the chosen rows."""
        slots, counts, elapsed_ns, *flags = self
        fresh, opened, closed = (each[chosen] for each in flags)
        return Growth(slots[chosen], counts[chosen], elapsed_ns[chosen], fresh, opened, closed)


class Connections:
    """The counters of up to `most` connections at their last record; `names` are those of the flow stream's fields."""

    def __init__(self, names: Sequence[str], floor_ns: int, most: int) -> None:
        self.floor_ns = max(0, floor_ns)
        self.most = most
        self._kinds = bytes(map(_kind, names))
        self._columns = {name: column for column, name in enumerate(names)}
        self._parts = [column for name, column in self._columns.items() if name in _PARTS]
        self._count = 0
        self._allocate(min(_FIRST_ENTRIES, most))

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        keys: Ints,
        ts_ns: Ints,
        start_ns: Ints,
        closes: Mask,
        counters: Sequence[Ints],
        counts: Mask | None = None,
        accepted: Mask | None = None,
    ) -> Growth:
        """Take records in order of time, as far as known: columns with an item for each, `counters` one for each name.

        A connection's key must be the same in all its records, and differ from others'; a `start_ns` of 0 is unknown.
        `counts` is whether a record has counters: others only get a slot. With `accepted`, whether it is a server's,
        `segs_out` also grows by the SYN-ACKs, which the kernel sends before there is a socket.
        """
        records = np.empty((len(keys), _RECORD_WORDS + len(self._kinds)), np.int64)
        flags = np.where(closes, _CLOSES, 0)
        flags |= _COUNTS if counts is None else np.where(counts, _COUNTS, 0)
        for number, column in enumerate((keys, ts_ns, start_ns, flags, *counters)):
            records[:, number] = column
        results = np.empty((len(keys), _RESULT_WORDS + len(self._kinds)), np.int64)
        for start in range(0, len(keys), _CHUNK):
            chunk = records[start : start + _CHUNK]
            self._reserve(len(chunk))
            self._count = _native.add_connections(*self._table(), chunk, results[start : start + _CHUNK])
        outcomes, growth = results[:, 1], results[:, _RESULT_WORDS:]
        if _TOTAL in self._columns and _OTHER in self._columns:
            rest = growth[:, self._columns[_TOTAL]] - growth[:, self._parts].sum(axis=1)
            growth[:, self._columns[_OTHER]] = np.maximum(0, rest)
        if accepted is not None:
            first = accepted & (outcomes & _OPENED != 0)
            growth[:, self._columns[_SENT]] += growth[:, self._columns[_SYN_ACKS]] + first
        return Growth(
            results[:, 0], growth, results[:, 2], *(outcomes & each != 0 for each in (_FRESH, _OPENED, _CLOSED))
        )

    def count_flows(self, rows: Rows, errors: Bytes, srtt_bounds_us: Ints, counts: NDArray[np.void]) -> None:
        """Take rows of the flow stream, and add to `counts` what they count: see native/tcp_counts.h.

        The counters are segments sent and retransmissions by cause.
        """
        self._reserve(len(rows))
        self._count = _native.count_flows(*self._table(), rows, errors, srtt_bounds_us, counts)

    def forget(self, closed_ns: int = _MOST_NS, open_ns: int = 0) -> int:
        """Drop connections that closed before `closed_ns`, and others without a record since `open_ns`.

        Return how many were open.
        """
        used = self._entries[: self._count]
        closed = used[:, _STATE] & _CLOSES != 0
        gone = used[:, _LAST_NS] < np.where(closed, closed_ns, open_ns)
        self.keep(~gone)
        return int(np.count_nonzero(gone & ~closed))

    def make_room(self, count: int) -> int:
        """Drop the oldest connections if there is no room for `count` more; return how many were open."""
        if self._count + count <= self.most:
            return 0
        excess = max(self._count + count - self.most, self.most // 8)
        last_ns = self._entries[: self._count, _LAST_NS]
        kept = np.ones(self._count, np.bool_)
        kept[np.argsort(last_ns, kind="stable")[:excess]] = False
        forgotten = ~kept & (self._entries[: self._count, _STATE] & _CLOSES == 0)
        self.keep(kept)
        return int(np.count_nonzero(forgotten))

    def keep(self, kept: Mask) -> None:
        """Drop all other connections; slots are renumbered, in the same order."""
        if kept.all():
            return
        used = self._entries[: self._count]
        open_ns = used[~kept & (used[:, _STATE] & _CLOSES == 0), _LAST_NS]
        self.floor_ns = max(self.floor_ns, int(open_ns.max(initial=0)))
        rest = used[kept]
        self._count = len(rest)
        self._entries[: self._count] = rest
        _native.index_connections(*self._table())

    def _allocate(self, size: int) -> None:
        before = self._entries[: self._count] if self._count else None
        self._entries: NDArray[Any] = np.empty((size, _ENTRY_WORDS + len(self._kinds)), np.int64)
        self._slots = np.zeros(1 << (2 * size - 1).bit_length(), np.uint64)
        if before is not None:
            self._entries[: self._count] = before
            _native.index_connections(*self._table())

    def _reserve(self, count: int) -> None:
        needed = min(self.most, self._count + count)
        if needed > len(self._entries):
            self._allocate(min(self.most, max(2 * len(self._entries), needed)))

    def _table(self) -> tuple[Any, Any, bytes, int, int, int]:
        return self._slots, self._entries, self._kinds, self._count, self.floor_ns, _SEED
