"""Who lost segments, where and why, from the events of the demo. Pure computation, no input or output."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Path:
    """Segments from one address to another, of the connections to one port."""

    sender: str
    receiver: str
    port: int
    sent: int = 0
    """With retransmissions."""
    causes: Counter[str] = field(default_factory=Counter)
    """Retransmitted segments by cause."""

    @property
    def retransmitted(self) -> int:
        """Retransmitted segments."""
        return self.causes.total()

    @property
    def ratio(self) -> float:
        """Retransmitted segments divided by those sent."""
        return self.retransmitted / self.sent if self.sent else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the path for JSON output."""
        where = {"sender": self.sender, "receiver": self.receiver, "port": self.port}
        return {**where, "sent": self.sent, "retransmitted": self.retransmitted, "causes": dict(self.causes)}


class Paths:
    """Counts segments by path."""

    def __init__(self) -> None:
        self._paths: dict[tuple[str, str, int], Path] = {}
        self.retransmitted: Counter[str] = Counter()
        """All retransmitted segments, by cause."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a transmit or a retransmission; other records are ignored."""
        if "segs" not in record:
            return
        # The lower port is the server's: the other end has one of those for clients.
        key = record["saddr"], record["daddr"], min(record["sport"], record["dport"])
        path = self._paths.get(key) or self._paths.setdefault(key, Path(*key))
        if "cause" in record:
            path.causes[record["cause"]] += record["segs"]
            self.retransmitted[record["cause"]] += record["segs"]
        else:
            path.sent += record["segs"]

    def worst(self, most: int) -> list[Path]:
        """Return the paths with the most retransmitted segments, worst first."""
        losing = [path for path in self._paths.values() if path.retransmitted]
        return sorted(losing, key=lambda path: -path.retransmitted)[:most]
