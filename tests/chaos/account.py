"""The producer's account over many starts: events that it numbered, and losses that it reported."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

UNNUMBERED = "nested"
"""The reason of losses without a number, because the program in the kernel did not run. They leave no gap."""


@dataclass(slots=True)
class TopicAccount:
    """One topic's account, from balances that the producer reported.

    The producer's counts continue over a start that takes over the rings, and restart with new rings. A crash on a full
    disk may revert reported losses; here they still count.
    """

    numbered: int = 0
    """Events that got a number."""
    lost: Counter[str] = field(default_factory=Counter)
    unaccounted: int = 0
    """Number of balances that did not add up."""
    _numbered_before: int = 0
    _lost_before: Mapping[str, int] = field(default_factory=dict)

    def new_rings(self) -> None:
        """Note that the producer's counts restart at 0."""
        self._numbered_before, self._lost_before = 0, {}

    def note(self, passed: int, carried: int, delivered: int, waiting: int, lost: Mapping[str, int]) -> None:
        """Add the increase since the last balance; `waiting` are events in flight, in the ring or on disk."""
        numbered = passed - carried - lost.get(UNNUMBERED, 0)
        self.numbered += max(0, numbered - self._numbered_before)
        for reason, count in lost.items():
            self.lost[reason] += max(0, count - self._lost_before.get(reason, 0))
        self._numbered_before, self._lost_before = numbered, dict(lost)
        self.unaccounted += passed != delivered + waiting + sum(lost.values())

    @property
    def named(self) -> int:
        """Losses that leave a gap."""
        return sum(count for reason, count in self.lost.items() if reason != UNNUMBERED)
