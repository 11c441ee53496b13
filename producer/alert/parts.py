"""The partitions that a member of the group has: from messages to the stages, and what is committed of them."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from producer.alert import exchange
from producer.alert.alert import Alert
from producer.alert.decide import Decider, view_of
from producer.alert.silence import Hosts
from producer.alert.windows import Outcome, SourceSums
from producer.config import AlertRule
from producer.decode import Decoder, UndecodableError

logger = logging.getLogger(__name__)

_MS_NS = 1_000_000


@dataclass(slots=True)
class Counts:
    """What a member did with what it read."""

    read: int = 0
    """Events."""
    late: int = 0
    """Events that came when a window of theirs was closed."""
    duplicate: int = 0
    """Events whose id had been counted."""
    ahead: int = 0
    """Events of a time that is far ahead: not counted."""
    undecodable: int = 0
    """Messages that are none of ours."""
    alerts: int = 0
    """Changes that were put out."""

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in asdict(self).items())


class Committed(NamedTuple):
    """Where to go on: an offset, and what Kafka keeps beside it."""

    offset: int
    metadata: str = ""

    def facts(self) -> dict[str, int]:
        """Return what is kept beside the offset."""
        try:
            facts = json.loads(self.metadata or "{}")
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}  # another program's


class Stage(Protocol):
    """What each of the stages has."""

    next: int

    @property
    def position(self) -> int:
        """The offset to go on from after a restart."""


class Part(ABC):
    """A partition of the topic `topic`; what is done with its messages, its subclass says."""

    def __init__(self, topic: str, stage: Stage, counts: Counts) -> None:
        self.topic = topic
        self.counts = counts
        self.until: tuple[int, int] | None = None
        """Where it ended, at a time in nanoseconds; None as soon as it has been read up to there."""
        self._stage = stage
        self._is_warned = False

    @property
    def next(self) -> int:
        """The offset to read next."""
        return self._stage.next

    def put(self, value: bytes | None, offset: int, now_ns: int) -> None:
        """Take a message; one that is none of ours is counted."""
        try:
            self._take(value, offset, now_ns)
        except (UndecodableError, KeyError, TypeError, ValueError, OverflowError) as exc:
            self._stage.next = offset + 1
            self.counts.undecodable += 1
            if not self._is_warned:
                self._is_warned = True
                logger.warning("passing over messages of topic=%s: %r", self.topic, exc)

    def end(self, offset: int) -> None:
        """Note that there is nothing before this offset that was not read."""
        self._stage.next = max(self._stage.next, offset)

    def reach(self) -> None:
        """Let the stage know where it has been read up to `until`."""
        if self.until is not None and self.next >= self.until[0]:
            self._read_to_end(self.until[1])
            self.until = None

    def committed(self) -> Committed:
        """Return what to commit when all that the partition gave is out."""
        return Committed(self._stage.position, json.dumps(self._facts()))

    @abstractmethod
    def _take(self, value: bytes | None, offset: int, now_ns: int) -> None:
        """Take a message; what it raises says that it is none of ours."""

    @abstractmethod
    def _read_to_end(self, at_ns: int) -> None:
        """Note that all that Kafka had at that time has been read."""

    def _facts(self) -> dict[str, int]:
        return {}


class SourcePart(Part):
    """A partition of a topic of events; `stream` is which, `name` what it is called in the sums."""

    def __init__(
        self,
        topic: str,
        stream: str,
        name: str,
        rules: Iterable[AlertRule],
        lateness_s: float,
        committed: Committed,
        decoder: Decoder,
        counts: Counts,
    ) -> None:
        facts = committed.facts()
        views = {view_of(rule) for rule in rules}
        self.sums = SourceSums(views, round(lateness_s * 1e9), committed.offset, facts.get("watermark_ns", 0))
        super().__init__(topic, self.sums, counts)
        self.stream, self.name = stream, name
        self._decoder = decoder
        self._counted_to = facts.get("next", 0)

    def _take(self, value: bytes | None, offset: int, now_ns: int) -> None:
        outcome = self.sums.add(self._decoder.decode(value), offset, now_ns)
        if offset < self._counted_to:  # a predecessor read it
            return
        self.counts.read += 1
        if outcome is not Outcome.COUNTED:
            setattr(self.counts, outcome.value, getattr(self.counts, outcome.value) + 1)

    def _read_to_end(self, at_ns: int) -> None:
        self.sums.read_to_end(at_ns)

    def _facts(self) -> dict[str, int]:
        return {"watermark_ns": self.sums.watermark_ns, "next": max(self.next, self._counted_to)}


class SumsPart(Part):
    """A partition of the topic of the sums."""

    def __init__(
        self,
        topic: str,
        rules: Iterable[AlertRule],
        sources: Collection[str],
        known: Iterable[Alert],
        committed: Committed,
        counts: Counts,
    ) -> None:
        decided_ns = committed.facts().get("decided_ns", 0)
        self._decider = Decider(rules, sources, known, committed.offset, decided_ns)
        super().__init__(topic, self._decider, counts)

    @property
    def firing(self) -> list[Alert]:
        """What fires."""
        return self._decider.firing

    def changes(self) -> list[Alert]:
        """Return what has changed since the last time."""
        return self._decider.decide()

    def _take(self, value: bytes | None, offset: int, now_ns: int) -> None:
        message: dict[str, Any] = json.loads(value or b"")
        if "watermark_ns" in message:
            self._decider.pass_time(message["part"], message["watermark_ns"], offset)
        else:
            self._decider.add(message["stream"], message["part"], exchange.sums_of(message), offset)

    def _read_to_end(self, at_ns: int) -> None:
        """Do nothing: time is what the watermarks say."""

    def _facts(self) -> dict[str, int]:
        return {"decided_ns": self._decider.decided_ns}


class HeartbeatPart(Part):
    """A partition of the topic of heartbeats."""

    def __init__(
        self,
        topic: str,
        missed: float,
        known: Iterable[Alert],
        committed: Committed,
        decoder: Decoder,
        counts: Counts,
    ) -> None:
        self._hosts = Hosts(missed, known, committed.offset)
        super().__init__(topic, self._hosts, counts)
        self._decoder = decoder
        self._read_to_ns = 0

    @property
    def firing(self) -> list[Alert]:
        """The silent hosts."""
        return self._hosts.firing

    def changes(self) -> list[Alert]:
        """Return what has changed since the last time."""
        return self._hosts.look(self._read_to_ns)

    def _take(self, value: bytes | None, offset: int, now_ns: int) -> None:
        beat = self._decoder.decode(value)
        self._hosts.heard(beat, offset, beat["ts"] * _MS_NS, now_ns)

    def _read_to_end(self, at_ns: int) -> None:
        self._read_to_ns = at_ns
