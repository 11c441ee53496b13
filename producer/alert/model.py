"""An alert, and where it goes: what the deciding part hands to the sinks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Alert:
    """That a rule begins or ceases to hold for a group. Times are in nanoseconds since 1970 UTC."""

    rule: str
    by: str
    """What is one group: host, peer, flow or port."""
    group: str
    firing: bool
    """False: resolved."""
    measure: str
    """count, ratio or silence."""
    value: float
    """In the window that decided: segments sent again, their share of all, or seconds of silence."""
    threshold: float
    clear: float
    window_start_ns: int
    window_s: float
    segs: int
    retransmitted_segs: int
    since_ns: int
    """Begin of the window in which it began to fire."""

    @property
    def key(self) -> str:
        """What tells it from other alerts: the key in the topic."""
        return f"{self.rule}/{self.group}"


class Sink(Protocol):
    """Puts alerts out. It tries until they are, and raises what its way of waiting raises where it is to give up."""

    def send(self, alerts: Sequence[Alert]) -> None:
        """Put alerts out, in their order; they are out when this returns. The same ones may come again."""

    def repeat(self, firing: Collection[Alert]) -> None:
        """Be reminded of all that fire, every few seconds: for those who forget what they are not told again."""

    def close(self) -> None:
        """End."""
