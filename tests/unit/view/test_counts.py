"""What a view counts beside the kernel, and what it has missed."""

from typing import Any

import numpy as np
import pytest

from producer.events import FLOW_EVENT, REASONS
from producer.view.kernel_count import KernelCount
from producer.view.unseen import Unseen


class Busy:
    """A kernel that goes on counting: by `steps` at each look, whose events a ring then has."""

    def __init__(self, *steps: int) -> None:
        self._steps = iter(steps)
        self.counted = 1000
        self.seen = 0
        self.missed = 0

    def count(self) -> int:
        """Count up, then return the counter, as reading it takes a moment."""
        more = next(self._steps, 0)
        self.counted += more
        self.seen += more
        return self.counted

    def read(self) -> int:
        return self.seen - self.missed


@pytest.mark.parametrize("missed", [0, 3])
@pytest.mark.parametrize(
    ("steps", "unsure"), [((), 0), ((5,), 0), ((5, 0, 0, 7, 1), 0), ((1,) * 500, 1)], ids=["idle", "1", "3", "busy"]
)
def test_counts_agree_unless_an_event_is_missing(steps: tuple[int, ...], unsure: int, missed: int) -> None:
    kernel = Busy(*steps)
    count = KernelCount(kernel.count)
    count.begin(kernel.read)
    for _ in range(10):
        count.update(kernel.read)
        assert count.counted == count.seen
    kernel.missed = missed
    for _ in range(50):
        count.update(kernel.read)
    assert count.counted - count.seen == max(0, missed - unsure)


def row(cookie: int, other: int, *, start: int = 0, reason: str = "interval") -> Any:
    made = np.zeros(1, FLOW_EVENT)
    made["flow"]["sk_cookie"], made["retrans_other"], made["start_ns"] = cookie, other, start
    made["reason"] = REASONS.index(reason)
    return made


def test_only_what_is_unseen_since_the_beginning_counts() -> None:
    unseen = Unseen()
    unseen.add(row(1, 70), beginning=True)
    unseen.add(row(2, 2, start=5), beginning=True)
    unseen.add(row(3, 0), beginning=True)
    assert unseen.segs == 2
    unseen.add(row(1, 73), beginning=False)
    unseen.add(row(3, 4), beginning=False)
    assert unseen.segs == 9
    unseen.add(row(2, 0, start=5), beginning=False)
    assert unseen.segs == 7, "a segment was being sent"
    unseen.add(row(1, 74, reason="close"), beginning=False)
    unseen.add(row(1, 1, start=9), beginning=False)
    assert unseen.segs == 9


def test_earlier_retransmissions_of_a_connection_without_an_owner_are_not_lost() -> None:
    unseen = Unseen()
    unseen.add(row(1, 0), beginning=True)
    unseen.add(row(2, 1816), beginning=False)
    assert unseen.segs == 0
    unseen.add(row(2, 1817), beginning=False)
    unseen.add(row(2, 1818, reason="close"), beginning=False)
    unseen.add(row(3, 900, reason="close"), beginning=False)
    assert unseen.segs == 2
