"""The kernel's count of retransmitted segments, beside the count of their events."""

from collections.abc import Callable
from pathlib import Path

from producer.host.tcp_counters import parse_counters

_TRIES = 5


def retrans_segs() -> int:
    """Return RetransSegs of this network namespace."""
    return parse_counters(Path("/proc/self/net/snmp").read_text())["RetransSegs"]


class KernelCount:
    """Compares the growth of a counter with that of the events, from `begin` on.

    Counter and ring cannot be read at once. So the counter is read before and after the ring, again if it has grown in
    between; what it has counted by then counts as seen. Again also if they differ, because a segment is counted a
    moment before or after its event.
    """

    def __init__(self, count: Callable[[], int] = retrans_segs) -> None:
        self._count = count
        self._first = self._last = (0, 0, 0)

    def begin(self, read: Callable[[], int]) -> None:
        """Start at 0, after `read` has taken in earlier events; it returns how many segments were seen so far."""
        for _ in range(_TRIES):
            before, _, after = self._first = self._last = self._sample(read)
            if before == after:
                break

    def update(self, read: Callable[[], int]) -> None:
        """Take in the events until now."""
        for _ in range(_TRIES):
            before, _, after = self._last = self._sample(read)
            if before == after and self.counted == self.seen:
                break

    def _sample(self, read: Callable[[], int]) -> tuple[int, int, int]:
        return self._count(), read(), self._count()

    @property
    def counted(self) -> int:
        """The kernel's count at the last update, as close to `seen` as is possible."""
        (first_before, _, first_after), (before, _, after) = self._first, self._last
        return min(max(self.seen, before - first_after), after - first_before)

    @property
    def seen(self) -> int:
        """The count of the events."""
        return self._last[1] - self._first[1]
