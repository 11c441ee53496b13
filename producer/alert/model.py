"""Alerts, and the protocol of their sinks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Alert:
    """A group starts or stops firing a rule. Times are in nanoseconds since 1970 UTC."""

    rule: str
    by: str
    """Kind of group: host, peer, flow or port."""
    group: str
    firing: bool
    """False: resolved."""
    measure: str
    """count, ratio or silence."""
    value: float
    """In the deciding window: retransmitted segments, their ratio to all segments, or seconds of silence."""
    threshold: float
    clear: float
    window_start_ns: int
    window_s: float
    segs: int
    retransmitted_segs: int
    since_ns: int
    """Start of the first firing window."""

    @property
    def key(self) -> str:
        """Identity of the alert, and its key in the topic."""
        return f"{self.rule}/{self.group}"


class Sink(Protocol):
    """Publishes alerts. Retries until it succeeds; an exception from its sleep function ends the retries."""

    def send(self, alerts: Sequence[Alert]) -> None:
        """Publish alerts in order, and return when they are out. May be called with the same alerts again."""

    def repeat(self, firing: Collection[Alert]) -> None:
        """Repeat everything that fires, every few seconds, for receivers that expire alerts."""

    def close(self) -> None:
        """Release resources."""
