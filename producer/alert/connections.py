"""What each connection did since its record before, without I/O.

Flow records have counters since the connection began. A record counts the difference to the connection's record before,
at its own time. Of a connection without one, the record counts in full if the connection began after `floor_ns`, the
time from which all records are known; otherwise only its later records count. Records may repeat or be out of order:
one that is not later than the last counts nothing. The kernel's counters have 32 bits, and may wrap.

Memory is bounded: connections without a record for an hour, and the oldest if there are too many, are forgotten, and
`floor_ns` rises to their last records. A connection that closed is kept until its window is decided, so that a copy of
its last record counts nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from producer.consume.columns import Columns, Ints, Mask, groups
from producer.consume.plan import Fields
from producer.events import CAUSES

CAUSE_COUNTERS = tuple(f"retrans_{cause}" for cause in CAUSES)
COUNTERS = ("segs_out", "data_segs_out", *CAUSE_COUNTERS)
FIELDS: Fields = (
    ("boot_id", "string"),
    ("netns", "long"),
    ("sk_cookie", "long?"),
    ("start_ns", "long?"),
    ("reason", "string"),
    *((name, "long?") for name in COUNTERS),
)
MOST_CONNECTIONS = 1 << 22
"""About 1 GiB."""
_EXPIRES_NS = 3_600_000_000_000
_FIRST_SLOTS = 1 << 10
_WRAP = (1 << 32) - 1
_FACTOR = np.int64(0x1E3779B97F4A7C15)


def mixed(columns: Sequence[Ints]) -> Ints:
    """Return a hash of each row. Unpredictable if one of the columns is."""
    total = columns[0].copy()
    for column in columns[1:]:
        total = (total ^ total >> 29) * _FACTOR + column
    return (total ^ total >> 32) * _FACTOR


class Differences(NamedTuple):
    """By record, in their order: what it counts of each of COUNTERS, and whether it is its connection's first close.

    `fresh`: it is later than the connection's records before, and no copy.
    """

    counts: Ints
    closes: Mask
    fresh: Mask


class Connections:
    """The last counters of up to `most` connections."""

    def __init__(self, floor_ns: int, most: int = MOST_CONNECTIONS) -> None:
        self.floor_ns = floor_ns
        self.forgotten = 0
        """Open connections forgotten for lack of memory."""
        self._most = most
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._resize(_FIRST_SLOTS)

    def __len__(self) -> int:
        return len(self._slots)

    def _resize(self, size: int) -> None:
        shapes = {"_counters": (size, len(COUNTERS)), "_last_ns": (size,), "_keys": (size,), "_closed": (size,)}
        for name, shape in shapes.items():
            grown: Any = np.zeros(shape, np.bool_ if name == "_closed" else np.int64)
            before = getattr(self, name, grown[:0])
            grown[: len(before)] = before
            setattr(self, name, grown)

    _counters: Ints
    _last_ns: Ints
    _keys: Ints
    _closed: Mask

    def add(self, flows: Columns) -> Differences:
        """Take records with possible numbers."""
        counts = np.zeros((len(flows), len(COUNTERS)), np.int64)
        if not len(flows):
            return Differences(counts, np.zeros(0, np.bool_), np.zeros(0, np.bool_))
        identities = self._identities(flows)
        ids, firsts = groups(identities)
        slots, is_new = self._slots_of(identities[firsts].tolist())
        closes = self._first_closes(flows, ids, slots)
        order = np.lexsort((flows["ts_ns"], ids))
        order = order[(flows["ts_ns"] > self._last_ns[slots][ids])[order]]
        fresh = np.zeros(len(flows), np.bool_)
        fresh[order[(np.diff(ids[order], prepend=-1) != 0) | (np.diff(flows["ts_ns"][order], prepend=-1) != 0)]] = True
        order = order[flows.valid["segs_out"][order]]
        if len(order):
            ids = ids[order]
            heads = np.flatnonzero(np.diff(ids, prepend=-1))
            counters = np.stack([flows[name][order] for name in COUNTERS], axis=1)
            before = np.concatenate([counters[:1], counters[:-1]])
            start_ns = np.where(flows.valid["start_ns"], flows["start_ns"], -1)[order][heads]
            base = np.where((start_ns > self.floor_ns)[:, None], 0, counters[heads])
            found = slots[ids[heads]]
            before[heads] = np.where(is_new[ids[heads], None], base, self._counters[found])
            counts[order] = (counters - before) & _WRAP
            tails = np.append(heads[1:], len(order)) - 1
            self._counters[found] = counters[tails]
            self._last_ns[found] = flows["ts_ns"][order][tails]
        return Differences(counts, closes, fresh)

    @staticmethod
    def _identities(flows: Columns) -> Ints:
        where = [flows.hashes[flows["saddr"]], flows.hashes[flows["daddr"]], flows["sport"], flows["dport"]]
        # Without a cookie, the addresses and ports are the best that is known.
        socket = np.where(flows.valid["sk_cookie"], flows["sk_cookie"], mixed(where))
        return mixed([flows.hashes[flows["host"]], flows.hashes[flows["boot_id"]], flows["netns"], socket])

    def _first_closes(self, flows: Columns, ids: Ints, slots: Ints) -> Mask:
        closes = np.zeros(len(flows), np.bool_)
        close = flows.texts.index("close") if "close" in flows.texts else -1
        rows = np.flatnonzero((flows["reason"] == close) & ~self._closed[slots][ids])
        closes[rows[np.unique(ids[rows], return_index=True)[1]]] = True
        self._closed[slots[ids[rows]]] = True
        return closes

    def _slots_of(self, keys: list[int]) -> tuple[Ints, Mask]:
        """Return the slot of each connection, and whether it is new."""
        found = [self._slots.get(key, -1) for key in keys]
        missing = found.count(-1)
        if missing > self._most - len(self._slots):
            self._forget_oldest(max(missing, self._most // 8))
            found = [self._slots.get(key, -1) for key in keys]
        is_new = np.fromiter((slot < 0 for slot in found), np.bool_, len(found))
        slots = np.fromiter(
            (self._new_slot(key) if slot < 0 else slot for key, slot in zip(keys, found, strict=True)),
            np.int64,
            len(found),
        )
        return slots, is_new

    def _new_slot(self, key: int) -> int:
        slot = self._free.pop() if self._free else len(self._slots)
        if slot == len(self._keys):
            self._resize(2 * slot)
        self._slots[key] = slot
        self._keys[slot] = key
        self._last_ns[slot], self._closed[slot] = 0, False
        return slot

    def forget(self, decided_ns: int) -> None:
        """Forget connections that closed before `decided_ns`, and those without a record for an hour before."""
        used = self._used()
        last_ns = self._last_ns[used]
        gone = last_ns < np.where(self._closed[used], decided_ns, decided_ns - _EXPIRES_NS)
        self._drop(used[gone])

    def _forget_oldest(self, count: int) -> None:
        used = self._used()
        oldest = used[np.argsort(self._last_ns[used], kind="stable")[:count]]
        self.forgotten += int(np.count_nonzero(~self._closed[oldest]))
        self._drop(oldest)

    def _used(self) -> Ints:
        return np.fromiter(self._slots.values(), np.int64, len(self._slots))

    def _drop(self, slots: Ints) -> None:
        open_ns = self._last_ns[slots[~self._closed[slots]]]
        self.floor_ns = max(self.floor_ns, int(open_ns.max(initial=0)))
        for key in self._keys[slots].tolist():
            self._free.append(self._slots.pop(key))
