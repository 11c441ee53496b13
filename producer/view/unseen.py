"""Retransmissions for which the kernel ran no program, by the records of their connections (docs/truth.md)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from producer.events import REASONS

_CLOSE = REASONS.index("close")


class Unseen:
    """Counts `retrans_other` of all connections, less what connections had when counting began."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], int] = {}
        self._last: dict[tuple[int, int], int] = {}
        self._closed = 0
        self._older = np.zeros(0, np.uint64)
        """Cookies of the connections in the beginning."""

    @property
    def segs(self) -> int:
        """The segments so far. One that is being sent may be among them until the next records."""
        return self._closed + sum(self._last.values()) - sum(self._first.values())

    def add(self, rows: NDArray[Any], *, beginning: bool) -> None:
        """Take rows of the flow stream; in the beginning, older connections start to count.

        One that only appears later had no owner, so that it was not found: it starts to count then.
        """
        cookies = rows["flow"]["sk_cookie"]
        if beginning:
            self._older = np.union1d(self._older, cookies)
        chosen = rows["retrans_other"] > 0
        if self._last:
            chosen |= np.isin(cookies, [cookie for cookie, _ in self._last])
        for row, is_known in zip(rows[chosen], np.isin(cookies[chosen], self._older), strict=True):
            key, segs = (int(row["flow"]["sk_cookie"]), int(row["start_ns"])), int(row["retrans_other"])
            if not row["start_ns"] and (beginning or not (is_known or key in self._last)):
                self._first[key] = segs
            self._last[key] = segs
            if row["reason"] == _CLOSE:
                self._closed += self._last.pop(key) - self._first.pop(key, 0)
