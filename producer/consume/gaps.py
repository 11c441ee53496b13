"""Tracks which event numbers of many counters were seen, with one bit per number, in pages.

Ranges would be smaller if the numbers came in order. They do not: a CPU's numbers are spread over the partitions, which
are read at different speeds, so millions of ranges of one number each can be open for long.

The numbers of a boot start at 1. After a crash without pinned rings they continue after the next multiple of 2**32: how
many events were lost at the end of such a generation is unknown.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from producer import _native
from producer.events import Ints, Mask

GENERATION_BITS = 32
PAGE_BITS = 12
PAGE_BYTES = 1 << PAGE_BITS - 3
_FIRST_PAGES = 64
MOST_PAGES = 1 << 20
"""512 MiB: enough for four billion numbers without gaps."""


class Numbers:
    """Numbers (from 1) seen of each counter (from 0), in at most `most` pages of 4096 numbers."""

    def __init__(self, most: int = MOST_PAGES) -> None:
        self._most = most
        self._slots: dict[tuple[int, int], int] = {}
        self._bits = np.zeros(_FIRST_PAGES * PAGE_BYTES, np.uint8)

    def slot(self, counter: int, page: int) -> int | None:
        """Return the slot of a counter's page, created if needed; None if the limit does not allow it."""
        slot = self._slots.get((counter, page))
        if slot is None and len(self._slots) < self._most:
            slot = self._slots[counter, page] = len(self._slots)
            if slot * PAGE_BYTES == len(self._bits):
                self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
        return slot

    def add(self, slots: Ints, numbers: Ints) -> Mask:
        """Add numbers[i] to the page in slots[i]; return which were new. Of equal ones the first is new."""
        return mark(self._bits, slots, numbers)

    def held(self) -> Iterator[tuple[int, Iterator[Ints]]]:
        """Yield each counter and its numbers, ascending, in pieces."""
        for counter, pages in groupby(sorted(self._slots), key=lambda page: page[0]):
            yield counter, (self._page(*page) for page in pages)

    def _page(self, counter: int, page: int) -> Ints:
        at = self._slots[counter, page] * PAGE_BYTES
        bits = np.unpackbits(self._bits[at : at + PAGE_BYTES], bitorder="little")
        return np.flatnonzero(bits).astype(np.int64) + ((page << PAGE_BITS) + 1)


def page_of(numbers: Ints) -> Ints:
    """Return the page of each number."""
    return numbers - 1 >> PAGE_BITS


def mark(bits: NDArray[np.uint8], slots: Ints, numbers: Ints) -> Mask:
    """Set the bits of numbers in the pages at `slots`; return which were not set before."""
    positions = slots << PAGE_BITS | numbers - 1 & (1 << PAGE_BITS) - 1
    return np.frombuffer(_native.mark(bits, positions), np.bool_)


@dataclass(frozen=True, slots=True)
class Gaps:
    """The gaps in a counter's numbers."""

    first: int
    """The first number; earlier ones are not counted as missing."""
    gaps: int
    missing: int
    """Numbers in the gaps."""
    unsure: int
    """Numbers missing before `complete_from`."""
    generations: frozenset[int]
    """Generations that the numbers jumped to: losses at the end of the previous ones are unknown."""


def find_gaps(pieces: Iterable[Ints], complete_from: int) -> Gaps:
    """Find the gaps in ascending numbers, at least one; from `complete_from` on, none should be missing."""
    gaps = missing = unsure = first = last = 0
    generations: set[int] = set()
    for piece in pieces:
        if not first:
            first = int(piece[0])
            last = first - 1
        before = np.concatenate([[last], piece[:-1]])
        last = int(piece[-1])
        jumps = piece > before + 1
        before, behind = before[jumps], piece[jumps]
        generation = behind - 1 >> GENERATION_BITS
        crossed = before - 1 >> GENERATION_BITS != generation
        generations.update(generation[crossed].tolist())
        absent = behind - 1 - np.where(crossed, generation << GENERATION_BITS, before)
        sure = behind > complete_from
        gaps += int(np.count_nonzero(absent[sure]))
        missing += int(absent[sure].sum())
        unsure += int(absent[~sure].sum())
    return Gaps(first, gaps, missing, unsure, frozenset(generations))
