"""Records of this host: a read ends, however fast the ring fills."""

from typing import Any

from producer.events import RETRANSMITS
from producer.view.local import _RING_BYTES, LocalSource
from tests.support.views import retransmits


class FullRing:
    """A ring that never runs empty."""

    def __init__(self) -> None:
        self.position = 0
        self._rows = retransmits(*({"cause": "rto", "segs": 1} for _ in range(8192)))

    def read(self, limit: int) -> Any:
        self.position += limit * self._rows.dtype.itemsize
        return self._rows[:limit]

    def commit(self, position: int) -> None:
        assert position == self.position


def test_a_read_of_a_ring_that_never_runs_empty_ends() -> None:
    source = LocalSource((RETRANSMITS,), {"host": "web-1", "labels": {}})
    rings: Any = {RETRANSMITS: FullRing()}
    source._rings = rings
    rows = sum(map(len, source.read()))
    size = RETRANSMITS.dtype.itemsize
    assert _RING_BYTES[RETRANSMITS.ring] <= rows * size < _RING_BYTES[RETRANSMITS.ring] + 8192 * size
