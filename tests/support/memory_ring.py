"""A ring in memory, whose rows are numbered by cpu_seq."""

from collections.abc import Callable

import numpy as np

from producer.events import Rows, Stream, common

STRIDE = 8
"""Position units per row."""


class MemoryRing:
    """The kernel's side, which outlives a process (`written`, `committed`), and the process's side (`position`).

    `commits` is called with each position to commit, and may raise.
    """

    def __init__(self, stream: Stream, size_rows: int, commits: Callable[[int], None]) -> None:
        self._dtype = stream.dtype
        self._size_rows = size_rows
        self._commits = commits
        self.written = self.position = self.committed = 0
        self.ring_full = self.damaged = 0
        self.bad: set[int] = set()
        """Numbers of damaged rows."""

    def arrive(self, count: int) -> None:
        """Write as many rows as fit, and count the others."""
        free = self._size_rows - (self.written - self.committed // STRIDE)
        self.written += min(count, free)
        self.ring_full += max(0, count - free)

    @property
    def records_before(self) -> int:
        return self.position // STRIDE

    @property
    def fill(self) -> float:
        return (self.written - self.committed // STRIDE) / self._size_rows

    @property
    def unread(self) -> int:
        return self.written - self.records_before

    @property
    def unread_share(self) -> float:
        return self.unread / self._size_rows

    def read(self, limit: int) -> Rows:
        first = self.position // STRIDE
        rows = np.zeros(min(limit, self.written - first), self._dtype)
        common(rows)["cpu_seq"] = np.arange(first, first + len(rows))
        common(rows)["ts"] = 10**9
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
