"""Remembers which events were counted: one bit per event number, in pages by boot and CPU.

The pages are grouped by the time of their last event, so that old ones can be dropped. With memory full, the oldest go.
"""

import numpy as np
from numpy.typing import NDArray

from producer.consume.columns import Ints, groups
from producer.consume.gaps import PAGE_BITS, PAGE_BYTES, mark

_PAGE_COST = PAGE_BYTES + 300
"""Memory of a page with its entries, measured."""
_FIRST_PAGES = 64

_Key = tuple[int, int, int]
"""Boot, CPU, and the page of the numbers."""


class EventIds:
    """Event ids of open windows, `width_ns` wide, in about `memory_bytes`, or what one batch needs."""

    def __init__(self, width_ns: int, memory_bytes: int) -> None:
        self.forgotten = 0
        """Ids that were forgotten for lack of memory."""
        self._width_ns = width_ns
        self._most = max(1, memory_bytes // _PAGE_COST)
        self._pages: dict[_Key, tuple[int, int]] = {}
        """Slot and time bucket of each page."""
        self._buckets: dict[int, set[_Key]] = {}
        self._free: list[int] = []
        self._bits = np.zeros(_FIRST_PAGES * PAGE_BYTES, np.uint8)

    def add(self, boots: Ints, cpus: Ints, numbers: Ints, ts_ns: Ints) -> NDArray[np.bool_]:
        """Add ids; return which are new. A duplicate's time may differ after a clock correction."""
        pages = numbers - 1 >> PAGE_BITS
        rows, firsts = groups(boots, cpus, pages)
        latest = ts_ns[firsts]
        np.maximum.at(latest, rows, ts_ns)
        keys = list(zip(*(column[firsts].tolist() for column in (boots, cpus, pages)), strict=True))
        self._make_room(keys)
        slots = [self._touch(key, at) for key, at in zip(keys, (latest // self._width_ns).tolist(), strict=True)]
        return mark(self._bits, np.array(slots, np.int64)[rows], numbers)

    def forget(self, before_ns: int) -> None:
        """Drop pages of closed windows; a window is kept after its end, for late duplicates."""
        for at in [at for at in self._buckets if (at + 2) * self._width_ns <= before_ns]:
            self._drop(at)

    def _make_room(self, keys: list[_Key]) -> None:
        """Drop the oldest pages until there is room for the new ones of `keys`; not while a batch uses its slots."""
        while self._buckets and len(self._pages) + sum(key not in self._pages for key in keys) > self._most:
            at = min(self._buckets)
            self.forgotten += sum(self._count(key) for key in self._buckets[at])
            self._drop(at)

    def _touch(self, key: _Key, bucket: int) -> int:
        """Return a page's slot, and note its time."""
        slot, before = self._pages.get(key) or (self._new_slot(), None)
        if before is None or before < bucket:
            if before is not None:
                self._leave(before, key)
            self._buckets.setdefault(bucket, set()).add(key)
            self._pages[key] = slot, bucket
        return slot

    def _new_slot(self) -> int:
        if self._free:
            return self._free.pop()
        slot = len(self._pages)
        if slot * PAGE_BYTES == len(self._bits):
            self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
        return slot

    def _leave(self, bucket: int, key: _Key) -> None:
        self._buckets[bucket].discard(key)
        if not self._buckets[bucket]:
            del self._buckets[bucket]

    def _drop(self, bucket: int) -> None:
        for key in self._buckets.pop(bucket):
            slot, _ = self._pages.pop(key)
            self._bits[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = 0
            self._free.append(slot)

    def _count(self, key: _Key) -> int:
        slot, _ = self._pages[key]
        return int(np.unpackbits(self._bits[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES]).sum())
