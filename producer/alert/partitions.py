"""The partitions that a member of the group has: from messages to the stages, and what is committed of them."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

from producer.alert import sums_topic
from producer.alert.evaluate import Decider, view_of
from producer.alert.model import Alert
from producer.alert.silence import Hosts
from producer.alert.windows import AHEAD_NS, ROOM_BYTES, Outcome, SourceSums
from producer.config.load import AlertRule
from producer.consume.decode import Decoder
from producer.errors import RebpfError

logger = logging.getLogger(__name__)

_MS_NS = 1_000_000
_NEVER_NS = (1 << 63) - 1
_SHOWN = 200


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
    crowded: int = 0
    """Events, sums, hosts and alerts of groups for which there was no room: not counted, or not told."""
    ids_forgotten: int = 0
    """Ids that were forgotten for want of room: copies of these events would be counted again."""
    undecodable: int = 0
    """Messages that are none of ours."""
    alerts: int = 0
    """Changes that were put out."""

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in asdict(self).items())


class Committed(NamedTuple):
    """Where to go on: an offset, and what Kafka keeps beside it. No time there is believed that is after `now_ns`."""

    offset: int
    metadata: str = ""
    now_ns: int = _NEVER_NS

    def facts(self) -> dict[str, int]:
        """Return the numbers that are kept beside the offset; another program may have put anything there."""
        try:
            facts = json.loads(self.metadata or "{}")
        except (ValueError, RecursionError):
            return {}
        if not isinstance(facts, dict):
            return {}
        numbers = {name: fact for name, fact in facts.items() if type(fact) is int and 0 <= fact <= _NEVER_NS}
        return {name: min(fact, self.now_ns) if name.endswith("_ns") else fact for name, fact in numbers.items()}


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
        self._is_warned = self._is_crowded = False

    @property
    def next(self) -> int:
        """The offset to read next."""
        return self._stage.next

    def put(self, value: bytes | None, offset: int, now_ns: int) -> None:
        """Take a message; one that is none of ours is counted."""
        crowded = self.counts.crowded
        try:
            self._take(value, offset, now_ns)
        except (RebpfError, MemoryError):  # of a server, or of this host
            raise
        except Exception as exc:  # whoever writes to the topic must not end its readers
            self._stage.next = offset + 1
            self.counts.undecodable += 1
            if not self._is_warned:
                self._is_warned = True
                logger.warning("passing over messages of topic=%s: %s", self.topic, repr(exc)[:_SHOWN])
        if self.counts.crowded > crowded and not self._is_crowded:
            self._is_crowded = True
            logger.warning("no room for more groups of topic=%s: not all are watched", self.topic)

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
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        facts = committed.facts()
        views = {view_of(rule) for rule in rules}
        watermark_ns = facts.get("watermark_ns", 0)
        self.sums = SourceSums(views, round(lateness_s * 1e9), committed.offset, watermark_ns, room_bytes)
        super().__init__(topic, self.sums, counts)
        self.stream, self.name = stream, name
        self._decoder = decoder
        self._counted_to = facts.get("next", 0)

    def _take(self, value: bytes | None, offset: int, now_ns: int) -> None:
        forgotten = self.sums.ids_forgotten
        outcome = self.sums.add(self._decoder.decode(value), offset, now_ns)
        self.counts.ids_forgotten += self.sums.ids_forgotten - forgotten
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
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        decided_ns = committed.facts().get("decided_ns", 0)
        self._decider = Decider(rules, sources, known, committed.offset, decided_ns, room_bytes)
        super().__init__(topic, self._decider, counts)

    @property
    def firing(self) -> list[Alert]:
        """What fires."""
        return self._decider.firing

    def changes(self) -> list[Alert]:
        """Return what has changed since the last time."""
        untold = self._decider.untold
        changes = self._decider.decide()
        self.counts.crowded += self._decider.untold - untold
        return changes

    def _take(self, value: bytes | None, offset: int, now_ns: int) -> None:
        message = sums_topic.read(value)
        if isinstance(message, sums_topic.Watermark):
            # A time that is still to come would have all windows up to it decided without their sums.
            self._decider.pass_time(message.part, min(message.ns, now_ns), offset)
        elif message.sums.start_ns > now_ns + AHEAD_NS:
            raise ValueError("sums of a window that is far ahead")
        else:
            self.counts.crowded += self._decider.add(message.stream, message.part, message.sums, offset)

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
        if not self._hosts.heard(beat, offset, beat["ts"] * _MS_NS, now_ns):
            self.counts.crowded += 1

    def _read_to_end(self, at_ns: int) -> None:
        self._read_to_ns = at_ns
