"""The balance of a stream: each event that passed the filter is delivered, in flight, on disk, or lost for a reason."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STAGES: Mapping[str, str] = {
    "ring_full": "kernel",
    "nested": "kernel",
    "unseen": "kernel",
    "old_ring": "hooks",
    "ring_damaged": "ring",
    "encode": "encode",
    "spool_dropped": "spool",
    "spool_expired": "spool",
    "spool_damaged": "spool",
    "stopped": "stop",
}
"""The stage of each reason for a loss, except errors of Kafka."""


def stage(reason: str) -> str:
    """Return the stage of a reason. Reasons that are not listed are Kafka errors, of the stage kafka."""
    return STAGES.get(reason, "kafka")


@dataclass(frozen=True, slots=True)
class Balance:
    """One stream's events since its ring was created, including `carried` ones that the spool held then:

        passed = delivered + in_flight + spooled + in_ring + the sum of lost

    `passed` includes runs that the kernel skipped because the program would have interrupted itself, lost as `nested`,
    and retransmissions for which it ran none, lost as `unseen`: the filter might have dropped them. Each event counts
    once: `in_ring` is not read yet, `spooled` is on disk, `in_flight` is sent but not acknowledged (and may be on disk,
    too).
    """

    passed: int
    delivered: int
    carried: int = 0
    in_flight: int = 0
    spooled: int = 0
    in_ring: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)

    @property
    def unaccounted(self) -> int:
        """Events that are nowhere: other than 0 is a bug."""
        located = self.delivered + self.in_flight + self.spooled + self.in_ring + sum(self.lost.values())
        return self.passed - located

    def as_dict(self) -> dict[str, Any]:
        """Return the balance for JSON output."""
        return asdict(self)

    def __str__(self) -> str:
        losses = ",".join(f"{reason}:{count}" for reason, count in self.lost.items()) or "0"
        counts = f"passed={self.passed} delivered={self.delivered} spooled={self.spooled} in_flight={self.in_flight}"
        rare = {"in_ring": self.in_ring, "carried": self.carried}
        return counts + "".join(f" {name}={count}" for name, count in rare.items() if count) + f" lost={losses}"
