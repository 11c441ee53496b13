"""The producer's own account over many starts: events that it numbered, and those that it says are lost."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

UNNUMBERED = "nested"
"""The reason of losses that have no number, since the program in the kernel did not run: they leave no gap."""


@dataclass(slots=True)
class TopicAccount:
    """One topic's account, from what the producer says of it now and then.

    Its counts go on where a start takes the rings over, and begin again where they are new. A crash on a full disk may
    take back losses that were said before: what was said counts.
    """

    numbered: int = 0
    """Events that got a number."""
    lost: Counter[str] = field(default_factory=Counter)
    unaccounted: int = 0
    """How often events were in none of the balance's places."""
    _numbered_before: int = 0
    _lost_before: Mapping[str, int] = field(default_factory=dict)

    def new_rings(self) -> None:
        """The counts begin at 0 again."""
        self._numbered_before, self._lost_before = 0, {}

    def note(self, passed: int, carried: int, delivered: int, waiting: int, lost: Mapping[str, int]) -> None:
        """Add what is new in a balance; `waiting` are in flight, in the ring or on disk."""
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
