"""Remembers which events were counted: one bit per event number, in pages by boot and CPU.

A page is dropped when its last event is old. When the memory is full, the oldest are dropped.
"""

import numpy as np

from producer.alert.model import Counts
from producer.consume.columns import groups
from producer.consume.gaps import PAGE_BYTES, mark, page_of
from producer.events import Ints, Mask

_PAGE_COST = PAGE_BYTES + 300
"""Memory of a page with its entries, measured."""
_FIRST_PAGES = 64


class EventIds:
    """Event ids of open windows, `width_ns` wide, in about `memory_bytes`, or what one batch needs."""

    def __init__(self, width_ns: int, memory_bytes: int, counts: Counts) -> None:
        self._counts, self._width_ns = counts, width_ns
        self._most = max(1, memory_bytes // _PAGE_COST)
        self._slots: dict[tuple[int, int, int], int] = {}
        """Slot of each page, by boot, CPU, and the page of the numbers."""
        self._free: list[int] = []
        self._bits = np.zeros((_FIRST_PAGES, PAGE_BYTES), np.uint8)
        self._last_ns = np.zeros(_FIRST_PAGES, np.int64)
        """Time of the last event of each slot."""

    def add(self, boots: Ints, cpus: Ints, numbers: Ints, ts_ns: Ints) -> Mask:
        """Add ids; return which are new. A duplicate's time may differ after a clock correction."""
        pages = page_of(numbers)
        rows, firsts = groups(boots, cpus, pages)
        keys = list(zip(*(column[firsts].tolist() for column in (boots, cpus, pages)), strict=True))
        excess = len(self._slots) + sum(key not in self._slots for key in keys) - self._most
        if excess > 0 and self._slots:  # not while a batch uses its slots
            self._drop_oldest(max(excess, self._most // 8))
        slots = np.array([self._slot(key) for key in keys], np.int64)[rows]
        np.maximum.at(self._last_ns, slots, ts_ns)
        return mark(self._bits.reshape(-1), slots, numbers)

    def forget(self, before_ns: int) -> None:
        """Drop pages of closed windows; a window is kept after its end, for late duplicates."""
        self._drop((self._last_ns // self._width_ns + 2) * self._width_ns <= before_ns)

    def _slot(self, key: tuple[int, int, int]) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = self._free.pop() if self._free else len(self._slots)
            if slot == len(self._bits):
                self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
                self._last_ns = np.concatenate([self._last_ns, np.zeros_like(self._last_ns)])
        return slot

    def _drop_oldest(self, count: int) -> None:
        used = np.array(list(self._slots.values()), np.int64)
        oldest = np.zeros(len(self._bits), np.bool_)
        oldest[used[np.argsort(self._last_ns[used], kind="stable")[:count]]] = True
        self._counts.forgotten += int.from_bytes(self._bits[oldest].tobytes(), "little").bit_count()
        self._drop(oldest)

    def _drop(self, chosen: Mask) -> None:
        for key in [key for key, slot in self._slots.items() if chosen[slot]]:
            self._free.append(self._slots.pop(key))
        self._bits[chosen] = 0
        self._last_ns[chosen] = 0
