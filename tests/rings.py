"""A ring in memory: rows that are numbered by cpu_seq, and room that is given back."""

from collections.abc import Callable

import numpy as np

from producer.events import Rows, Stream

STRIDE = 8
"""A position is so many times the rows before it."""


class MemoryRing:
    """The kernel's side, which outlives a process (`written`, `committed`), and the process's (`position`).

    `commits` is told of a position before which room is to be given back, and may raise.
    """

    def __init__(self, stream: Stream, size_rows: int, commits: Callable[[int], None]) -> None:
        self._dtype = stream.dtype
        self._size_rows = size_rows
        self._commits = commits
        self.written = self.position = self.committed = 0
        self.ring_full = self.damaged = 0
        self.bad: set[int] = set()
        """Numbers of rows that are damaged."""

    def arrive(self, count: int) -> None:
        """Write as many rows as there is room for, and count the others."""
        room = self._size_rows - (self.written - self.committed // STRIDE)
        self.written += min(count, room)
        self.ring_full += max(0, count - room)

    @property
    def records_before(self) -> int:
        return self.position // STRIDE

    @property
    def fill(self) -> float:
        return (self.written - self.committed // STRIDE) / self._size_rows

    def read(self, limit: int) -> Rows:
        first = self.position // STRIDE
        rows = np.zeros(min(limit, self.written - first), self._dtype)
        rows["s"]["cpu_seq"] = np.arange(first, first + len(rows))
        rows["s"]["ts"] = 10**9
        self.position += STRIDE * len(rows)
        good = [number not in self.bad for number in range(first, first + len(rows))]
        self.damaged = len(rows) - sum(good)
        return rows[good] if self.damaged else rows

    def holds(self, position: int) -> bool:
        return self.committed <= position <= self.written * STRIDE

    def commit(self, position: int) -> None:
        assert self.committed <= position <= self.position
        self._commits(position)
        self.committed = position
