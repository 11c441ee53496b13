"""The account of a stream: every event that passed the filter is delivered, on its way, or lost for a named reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Balance:
    """One stream's events since the hooks were attached: passed = delivered + spooled + in_flight + the sum of lost.

    `passed` includes runs that the kernel skipped because the program would have interrupted itself, lost as `nested`:
    whether the filter would have let them pass is not known. `in_flight` is all that is in the ring or under way to
    Kafka.
    """

    passed: int
    delivered: int
    in_flight: int
    lost: Mapping[str, int]
    spooled: int = 0

    @classmethod
    def of(cls, *, passed: int, ring_full: int, nested: int, delivered: int, lost: Mapping[str, int]) -> "Balance":
        """Add the kernel's counters and the sink's up; what is in neither is in flight."""
        losses = {"ring_full": ring_full, "nested": nested, **lost}
        losses = {reason: count for reason, count in losses.items() if count}
        passed += nested
        return cls(passed, delivered, passed - delivered - sum(losses.values()), losses)

    def as_dict(self) -> dict[str, Any]:
        """Return the balance as it is printed in JSON."""
        return {
            "passed": self.passed,
            "delivered": self.delivered,
            "spooled": self.spooled,
            "in_flight": self.in_flight,
            "lost": dict(self.lost),
        }

    def __str__(self) -> str:
        losses = ",".join(f"{reason}:{count}" for reason, count in self.lost.items()) or "0"
        counts = f"passed={self.passed} delivered={self.delivered} spooled={self.spooled} in_flight={self.in_flight}"
        return f"{counts} lost={losses}"
