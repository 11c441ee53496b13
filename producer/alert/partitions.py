"""A member's partitions: pass messages to the stages, and know what to commit."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from producer.alert import sums_topic
from producer.alert.evaluate import Decider, grouping_of
from producer.alert.model import Alert
from producer.alert.silence import Hosts
from producer.alert.windows import AHEAD_NS, EVENT_FIELDS, MEMORY_BYTES, Outcome, SourceSums
from producer.config.load import AlertRule
from producer.consume.columns import Ints, Values
from producer.consume.decode import Decoder, UndecodableError
from producer.errors import RebpfError

logger = logging.getLogger(__name__)

_MS_NS = 1_000_000
_NEVER_NS = (1 << 63) - 1
_SHOWN = 200
_Item = TypeVar("_Item")


@dataclass(slots=True)
class Counts:
    """A member's counts."""

    read: int = 0
    """Events."""
    late: int = 0
    """Events that arrived after their window was closed."""
    duplicate: int = 0
    """Events with an id that was counted before."""
    ahead: int = 0
    """Events from far in the future, not counted."""
    crowded: int = 0
    """Events, sums, hosts and alerts dropped because a limit on groups was reached."""
    ids_forgotten: int = 0
    """Ids forgotten for lack of memory: duplicates of these events would be counted."""
    undecodable: int = 0
    """Messages that are not ours."""
    alerts: int = 0
    """Alerts sent: changes of a group to firing or resolved."""

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in asdict(self).items())


class Committed(NamedTuple):
    """A committed offset and its metadata. Times in the metadata are capped at `now_ns`."""

    offset: int
    metadata: str = ""
    now_ns: int = _NEVER_NS

    def facts(self) -> dict[str, int]:
        """Return the numbers in the metadata, which another program may have written."""
        try:
            facts = json.loads(self.metadata or "{}")
        except (ValueError, RecursionError):
            return {}
        if not isinstance(facts, dict):
            return {}
        numbers = {name: fact for name, fact in facts.items() if type(fact) is int and 0 <= fact <= _NEVER_NS}
        return {name: min(fact, self.now_ns) if name.endswith("_ns") else fact for name, fact in numbers.items()}


class Stage(Protocol):
    """The common interface of the stages."""

    next: int

    @property
    def position(self) -> int:
        """The offset to resume from after a restart."""


class Partition(ABC):
    """A partition of `topic`; subclasses handle its messages."""

    def __init__(self, topic: str, stage: Stage, counts: Counts) -> None:
        self.topic = topic
        self.counts = counts
        self.until: tuple[int, int] | None = None
        """(end offset, time in ns at which it was the end); None once the partition has been read up to it."""
        self._stage = stage
        self._is_warned = self._is_crowded = False

    @property
    def next(self) -> int:
        """The offset to read next."""
        return self._stage.next

    def put(self, values: Values, offsets: Ints, now_ns: int) -> None:
        """Handle messages, in order; count those that are not ours."""
        crowded = self.counts.crowded
        self._take(values, offsets, now_ns)
        if self.counts.crowded > crowded and not self._is_crowded:
            self._is_crowded = True
            logger.warning("too many groups in topic=%s: not all are watched", self.topic)

    def end(self, offset: int) -> None:
        """Record that everything before this offset has been read."""
        self._stage.next = max(self._stage.next, offset)

    def reach(self) -> None:
        """Notify the stage if the partition has been read up to `until`."""
        if self.until is not None and self.next >= self.until[0]:
            self._read_to_end(self.until[1])
            self.until = None

    def committed(self) -> Committed:
        """Return what to commit once the partition's results have been published."""
        return Committed(self._stage.position, json.dumps(self._facts()))

    @abstractmethod
    def _take(self, values: Values, offsets: Ints, now_ns: int) -> None:
        """Handle messages; reject those that are not ours."""

    def _reject(self, count: int, reason: str) -> None:
        """Count messages that are not ours; log the first reason."""
        self.counts.undecodable += count
        if not self._is_warned:
            self._is_warned = True
            logger.warning("skipping messages of topic=%s: %s", self.topic, reason[:_SHOWN])

    def _each(self, messages: Iterable[_Item], offsets: Ints, take: Callable[[_Item, int], None]) -> None:
        """Call `take` with each message and its offset; reject the message if that raises."""
        for message, offset in zip(messages, offsets.tolist(), strict=True):
            try:
                take(message, offset)
            except (RebpfError, MemoryError):  # not about this message
                raise
            except Exception as exc:  # no message may stop its readers
                self._stage.next = offset + 1
                self._reject(1, repr(exc))

    @abstractmethod
    def _read_to_end(self, at_ns: int) -> None:
        """Record that everything that Kafka had at `at_ns` has been read."""

    def _facts(self) -> dict[str, int]:
        return {}


class EventPartition(Partition):
    """A partition of an event topic; `name` identifies it in the sums."""

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
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        facts = committed.facts()
        groupings = {grouping_of(rule) for rule in rules}
        watermark_ns = facts.get("watermark_ns", 0)
        self.sums = SourceSums(groupings, round(lateness_s * 1e9), committed.offset, watermark_ns, memory_bytes)
        super().__init__(topic, self.sums, counts)
        self.stream, self.name = stream, name
        self._decoder = decoder
        self._counted_to = facts.get("next", 0)

    def _take(self, values: Values, offsets: Ints, now_ns: int) -> None:
        forgotten = self.sums.ids_forgotten
        events, rejected = self._decoder.columns(values, EVENT_FIELDS)
        at = offsets if len(events) == len(offsets) else offsets[events.rows]
        outcomes = self.sums.add(events, at, now_ns)
        self.sums.next = int(offsets[-1]) + 1
        self.counts.ids_forgotten += self.sums.ids_forgotten - forgotten
        if rejected:
            self._reject(len(rejected), rejected[0].reason)
        if impossible := int(np.count_nonzero(outcomes == Outcome.IMPOSSIBLE)):
            self._reject(impossible, "numbers or names are out of range")
        ours = at >= self._counted_to
        self._note(outcomes if ours.all() else outcomes[ours])  # others were counted by a previous owner

    def _note(self, outcomes: NDArray[np.uint8]) -> None:
        found = np.bincount(outcomes, minlength=len(Outcome)).tolist()
        self.counts.read += len(outcomes) - found[Outcome.IMPOSSIBLE]
        self.counts.duplicate += found[Outcome.DUPLICATE]
        self.counts.late += found[Outcome.LATE]
        self.counts.ahead += found[Outcome.AHEAD]
        self.counts.crowded += found[Outcome.CROWDED]

    def _read_to_end(self, at_ns: int) -> None:
        self.sums.read_to_end(at_ns)

    def _facts(self) -> dict[str, int]:
        return {"watermark_ns": self.sums.watermark_ns, "next": max(self.next, self._counted_to)}


class SumsPartition(Partition):
    """A partition of the sums topic."""

    def __init__(
        self,
        topic: str,
        rules: Iterable[AlertRule],
        sources: Collection[str],
        last_alerts: Iterable[Alert],
        committed: Committed,
        counts: Counts,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        decided_ns = committed.facts().get("decided_ns", 0)
        self._decider = Decider(rules, sources, last_alerts, committed.offset, decided_ns, memory_bytes)
        super().__init__(topic, self._decider, counts)

    @property
    def firing(self) -> list[Alert]:
        """The firing alerts."""
        return self._decider.firing

    def changes(self) -> list[Alert]:
        """Return the changes since the last call."""
        suppressed = self._decider.suppressed
        changes = self._decider.decide()
        self.counts.crowded += self._decider.suppressed - suppressed
        return changes

    def _take(self, values: Values, offsets: Ints, now_ns: int) -> None:
        self._each(values, offsets, lambda value, offset: self._take_sums(value, offset, now_ns))

    def _take_sums(self, value: bytes | None, offset: int, now_ns: int) -> None:
        message = sums_topic.read(value)
        if isinstance(message, sums_topic.Watermark):
            # A future time would decide all windows up to it without their sums.
            self._decider.advance(message.source, min(message.ns, now_ns), offset)
        elif message.sums.start_ns > now_ns + AHEAD_NS:
            raise ValueError("the window is far in the future")
        else:
            self.counts.crowded += self._decider.add(message.stream, message.source, message.sums, offset)

    def _read_to_end(self, at_ns: int) -> None:
        """Do nothing: the watermarks are the time."""

    def _facts(self) -> dict[str, int]:
        return {"decided_ns": self._decider.decided_ns}


class HeartbeatPartition(Partition):
    """A partition of the heartbeat topic."""

    def __init__(
        self,
        topic: str,
        missed: float,
        last_alerts: Iterable[Alert],
        committed: Committed,
        decoder: Decoder,
        counts: Counts,
    ) -> None:
        self._hosts = Hosts(missed, last_alerts, committed.offset)
        super().__init__(topic, self._hosts, counts)
        self._decoder = decoder
        self._read_to_ns = 0

    @property
    def firing(self) -> list[Alert]:
        """The alerts of silent hosts."""
        return self._hosts.firing

    def changes(self) -> list[Alert]:
        """Return the changes since the last call."""
        return self._hosts.look(self._read_to_ns)

    def _take(self, values: Values, offsets: Ints, now_ns: int) -> None:
        beats = self._decoder.records(values)
        self._each(beats, offsets, lambda beat, offset: self._take_beat(beat, offset, now_ns))

    def _take_beat(self, beat: dict[str, Any] | UndecodableError, offset: int, now_ns: int) -> None:
        if isinstance(beat, UndecodableError):
            raise beat
        if not self._hosts.heard(beat, offset, beat["ts"] * _MS_NS, now_ns):
            self.counts.crowded += 1

    def _read_to_end(self, at_ns: int) -> None:
        self._read_to_ns = at_ns
