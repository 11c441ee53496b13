"""Alerts, the interface of their sinks, and the counts of records."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Alert:
    """A group starts or stops firing a rule. Times are in nanoseconds since 1970 UTC."""

    rule: str
    by: str
    """Kind of group: host, peer, ..."""
    group: str
    firing: bool
    """False: resolved."""
    measure: str
    """A rule's measure, or silence."""
    value: float
    """Of the measure, in the deciding window."""
    threshold: float
    clear: float
    window_start_ns: int
    window_s: float
    segs: int
    """Segments sent, connects that failed, or measured round-trip times."""
    retransmitted_segs: int
    since_ns: int
    """Start of the first window in which the threshold was reached."""
    severity: str = ""
    labels: str = "{}"
    """JSON, as the annotations."""
    annotations: str = "{}"
    causes: str = ""
    """What makes up the value, largest first: fast=12 rto=3."""
    hosts: str = ""
    """The hosts with most of it, by the flows that are known."""
    flows: str = ""
    """The worst flows, separated by commas."""

    @property
    def key(self) -> str:
        """Identity of the alert, and its key in the topic."""
        return f"{self.rule}/{self.group}"


class Sink(ABC):
    """Publishes alerts. Retries until it succeeds; an exception from its sleep function ends the retries."""

    @abstractmethod
    def send(self, alerts: Sequence[Alert]) -> None:
        """Publish alerts in order, and return when they are out. May be called with the same alerts again."""

    def repeat(self, firing: Collection[Alert]) -> None:  # noqa: B027
        """Repeat everything that fires, every few seconds, to a receiver that expires alerts."""

    def close(self) -> None:  # noqa: B027
        """Release resources."""


@dataclass(slots=True)
class Counts:
    """What became of the records. `producer.alert.status` describes each count."""

    read: int = 0
    late: int = 0
    duplicate: int = 0
    ahead: int = 0
    crowded: int = 0
    forgotten: int = 0
    undecodable: int = 0
    alerts: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in asdict(self).items())
