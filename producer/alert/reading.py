"""The active member's reading of all topics, up to alerts.

Each second the current ends of the partitions are requested. Once a partition has been read to its end of some time,
everything that Kafka had at that time is counted. The least of these times, less the lateness, decides; a partition
that lags behind the others for `wait_s` holds up nothing, and its records are late.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from producer.alert.engine import Engine, since, stream_of
from producer.alert.model import Alert, Counts
from producer.alert.silence import Hosts
from producer.config.alerts import SILENT
from producer.config.load import Config
from producer.consume.columns import Values
from producer.consume.decode import Decoder
from producer.consume.reader import PartitionId, by_partition
from producer.errors import ConfigError, UnavailableError
from producer.events import ALERTS, HEARTBEATS, Stream
from producer.host.text import parse_json
from producer.kafka.confluent import NEEDS_KAFKA, is_test_broker, list_topics
from producer.kafka.consumer import QuietConsumer, offsets, topic_error
from producer.topics import topic

logger = logging.getLogger(__name__)

_BATCH = 10_000
_ANSWER_S = 10.0
_LIST_S = 10.0
_SECOND_NS, _MS_NS = 1_000_000_000, 1_000_000
_STALL_STEPS = 300
"""Calls of `decide`, one a second, without a message from a partition that has some."""
_BACKLOG_NS = 60 * _SECOND_NS
_FIRST_NS = 1
"""The beginning of time; 0 is unknown."""
_SHOWN = 200
_FINAL = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED})


class StalledError(Exception):
    """The consumer has lost track of a partition for good; a new one reads on.

    Its topic was deleted and created again, for example: librdkafka ignores the new leader if its epoch is lower.
    """


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics that a configuration needs."""

    streams: dict[str, Stream]
    heartbeats: str | None
    """None if silence detection is off."""
    alerts: str

    @property
    def read(self) -> list[str]:
        """The topics whose records are read."""
        return [*self.streams, *([self.heartbeats] if self.heartbeats else [])]

    def partitions(self, consumer: Consumer, *, with_leader: bool = False) -> list[TopicPartition]:
        """Return all partitions of the topics that are read, or those that have a leader."""
        found = list_topics(consumer, _ANSWER_S).topics
        return [
            TopicPartition(name, number)
            for name in self.read
            if name in found
            for number, each in sorted(found[name].partitions.items())
            if each.leader >= 0 or not with_leader
        ]

    def require(self, consumer: Consumer) -> None:
        """Raise UnavailableError for a missing topic, PermissionDenied for one that this user may not read."""
        metadata = list_topics(consumer, _ANSWER_S)
        found = metadata.topics
        for name in (*self.read, self.alerts):
            if name not in found or found[name].error is not None:
                fix = "run `rebpf init --alerts`" if name == self.alerts else "run `rebpf init`"
                if is_test_broker(metadata):
                    raise UnavailableError(f"topic {name} does not exist: {NEEDS_KAFKA}")
                error = list_topics(consumer, _ANSWER_S, name).topics[name].error  # of all, it hides some
                if error is not None and error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise topic_error(name, error)
                raise UnavailableError(f"topic {name} does not exist: {fix}")
        if self.heartbeats and len(found[self.heartbeats].partitions) != 1:
            raise ConfigError(
                f"topic {self.heartbeats} has {len(found[self.heartbeats].partitions)} partitions, but "
                "silence detection needs exactly one: set alert.missed_heartbeats to 0"
            )


def topics_of(config: Config) -> Topics:
    """Return the topics that a configuration needs; ConfigError if it has nothing to alert on."""
    alert = config.alert
    if not alert.rules and not alert.missed_heartbeats:
        raise ConfigError("alert: nothing to alert on: add [[alert.rules]], or set missed_heartbeats above 0")
    streams = {str(topic(config, stream_of(rule))): stream_of(rule) for rule in alert.rules}
    return Topics(streams, topic(config, HEARTBEATS) if alert.missed_heartbeats else None, topic(config, ALERTS))


@dataclass(slots=True)
class Position:
    """How far a partition has been read."""

    next: int
    reached_ns: int
    """Everything that Kafka had at this time has been read."""
    until: tuple[int, int] | None = None
    """(end offset, time in ns at which it was the end); None once it has been read up to there."""
    at_end: float = field(default_factory=time.monotonic)
    """When it was last read to such an end."""
    still: int = 0
    """Steps since messages were last read, or it was last read to such an end."""

    def reach(self) -> None:
        """Note whether `until` has been reached."""
        self.still += 1
        if self.until is not None and self.next >= self.until[0]:
            self.reached_ns, self.until, self.at_end, self.still = self.until[1], None, time.monotonic(), 0

    def needs_end(self) -> bool:
        """Return whether to ask for the current end: it was read to the last one, or has not moved for long."""
        return self.until is None or self.still > _STALL_STEPS

    def set_end(self, end: int, at_ns: int) -> bool:
        """Set the current end; return False if the consumer no longer follows the partition."""
        follows = self.until is None and end >= self.next
        self.until = (end, at_ns)
        return follows

    def advance(self, run: list[Message], now_ns: int) -> None:
        """In a backlog, take the time of Kafka's timestamps, so that windows need not all stay open to its end.

        The least of a batch, since a host's clock may be ahead.
        """
        if self.reached_ns and run[-1].timestamp()[1] * _MS_NS < now_ns - _BACKLOG_NS:
            least_ns = min(message.timestamp()[1] for message in run) * _MS_NS
            self.reached_ns = max(self.reached_ns, min(least_ns, now_ns - _BACKLOG_NS))


class Reading:
    """Reads the topics from where the group left off, and decides."""

    def __init__(
        self, config: Config, brokers: str, topics: Topics, alerts: Sequence[Alert], decoder: Decoder, counts: Counts
    ) -> None:
        self._config, self._topics, self._decoder, self._counts = config.alert, topics, decoder, counts
        self._last_alerts = alerts
        overrides = {"auto.offset.reset": "earliest", "enable.partition.eof": "true"}
        self._connection = QuietConsumer(brokers, "alert", config.kafka.settings, overrides)
        self._consumer = self._connection.client
        self._positions: dict[PartitionId, Position] = {}
        self._committed: dict[PartitionId, TopicPartition] = {}
        self._warned: set[str] = set()
        self._next_list = 0.0

    def start(self, committed: Sequence[TopicPartition], *, from_beginning: bool) -> None:
        """Assign all partitions, from what the group has committed; those without a leader once they have one."""
        for each in committed:
            if each.error is not None:  # unknown is not the same as none
                raise KafkaException(each.error)
        now_ns = time.time_ns()
        decided = [_decided_ns(each.metadata, now_ns) for each in committed if each.offset >= 0]
        decided_ns = max(decided, default=0) or (_FIRST_NS if from_beginning else now_ns)
        since_ns = since(self._config.rules, decided_ns, self._config.lookback_s)
        silent = [alert for alert in self._last_alerts if alert.rule == SILENT and self._topics.heartbeats]
        others = [alert for alert in self._last_alerts if alert not in silent]
        hosts = Hosts(self._config.missed_heartbeats, silent)
        self._engine = Engine(self._config.rules, others, decided_ns, since_ns, self._decoder, self._counts, hosts)
        self._committed = {PartitionId(each.topic, each.partition): each for each in committed}
        self._add_partitions()
        if leaderless := sorted(self._committed.keys() - self._positions.keys()):
            names = ",".join(f"{topic}/{number}" for topic, number in leaderless)
            logger.warning("waiting for leaders of partitions=%s", names)

    def _firsts(self, new: Sequence[PartitionId]) -> dict[PartitionId, int]:
        """Return the offset of the first message that is needed to decide; of heartbeats, what is committed.

        Partitions that the group did not know at the start are not in it.
        """
        known = [where for where in new if where in self._committed]
        since_ms = since(self._config.rules, self.decided_ns, self._config.lookback_s) // _MS_NS
        ends = offsets(self._consumer, known, OFFSET_END, _ANSWER_S)  # first: messages may arrive
        beats = {
            where: offset if offset <= ends[where] else 0  # of a topic that was deleted and created again
            for where in known
            if where.topic == self._topics.heartbeats and (offset := self._committed[where].offset) >= 0
        }
        others = [where for where in known if where not in beats]
        found = offsets(self._consumer, others, since_ms, _ANSWER_S)
        return {**beats, **{where: found[where] if found[where] >= 0 else ends[where] for where in others}}

    @property
    def firing(self) -> list[Alert]:
        """The firing alerts."""
        return self._engine.firing

    @property
    def decided_ns(self) -> int:
        """The time up to which windows are decided."""
        return self._engine.decided_ns

    @property
    def lag_s(self) -> float:
        """Age of `decided_ns`, less the lateness."""
        return max(0.0, (time.time_ns() - self.decided_ns) / _SECOND_NS - self._config.lateness_s)

    @property
    def lag_messages(self) -> int:
        """Messages that Kafka has and that have not been read."""
        return sum(max(0, each.until[0] - each.next) for each in self._positions.values() if each.until)

    def positions(self) -> Iterator[tuple[PartitionId, int]]:
        """Yield what to commit: the next offset, or of the heartbeats the oldest of the live hosts' last ones."""
        for where, each in self._positions.items():
            yield where, self._engine.hosts.position if where.topic == self._topics.heartbeats else each.next

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def read(self, seconds: float) -> None:
        """Read a batch."""
        now_ns = time.time_ns()
        for where, run in by_partition(self._consumer.consume(_BATCH, seconds)):
            position = self._positions.get(where)
            error = run[-1].error()
            if error is not None:
                self._check(error, run.pop(), position)
            if run and position is not None:
                position.next, position.still = (run[-1].offset() or 0) + 1, 0
                position.advance(run, now_ns)
                self._take(where.topic, run, now_ns)

    def _check(self, error: KafkaError, message: Message, position: Position | None) -> None:
        if error.code() == KafkaError._PARTITION_EOF and position is not None:
            position.next = max(position.next, message.offset() or 0)
        elif error.fatal() or error.code() in _FINAL:
            raise topic_error(message.topic(), error)
        else:
            logger.debug("topic=%s: %s", message.topic(), error.str())

    def _take(self, name: str, run: list[Message], now_ns: int) -> None:
        values: Values = list(map(Message.value, run))
        crowded = self._counts.crowded
        if name == self._topics.heartbeats:
            reason = self._engine.put_beats(values, [message.offset() or 0 for message in run], now_ns)
        else:
            reason = self._engine.put(self._topics.streams[name], values, now_ns)
        if reason is not None and self._is_first(name):
            logger.warning("skipping messages of topic=%s: %s", name, reason[:_SHOWN])
        if self._counts.crowded > crowded and self._is_first(f"{name} crowded"):
            logger.warning("too many groups in topic=%s: not all are watched", name)

    def _is_first(self, what: str) -> bool:
        """Return True the first time only, so that each kind is logged once."""
        is_first = what not in self._warned
        self._warned.add(what)
        return is_first

    def decide(self) -> list[Alert]:
        """Return the changes that can be decided now. Raises StalledError."""
        for each in self._positions.values():
            each.reach()
        self._request_ends()
        streams = self._topics.streams
        reached = [each for where, each in self._positions.items() if where.topic in streams or not streams]
        latest = max((each.at_end for each in reached), default=0.0)
        keep_up = [each.reached_ns for each in reached if latest - each.at_end <= self._config.wait_s]
        if len(keep_up) < len(reached) and self._is_first("lag"):
            behind = len(reached) - len(keep_up)
            logger.warning("alert: partitions=%d lag behind the others: alerts do not wait", behind)
        lateness_ns = round(self._config.lateness_s * _SECOND_NS)
        reached_ns = max(self.decided_ns, min(keep_up, default=0) - lateness_ns)
        beats = self._positions.get(PartitionId(self._topics.heartbeats or "", 0))
        return self._engine.decide(reached_ns, beats.reached_ns if beats else 0)

    def _request_ends(self) -> None:
        """Request the current end of each partition that has been read to its last known end; add new partitions."""
        at_ns = time.time_ns()
        try:
            if time.monotonic() >= self._next_list:
                self._next_list = time.monotonic() + _LIST_S
                self._add_partitions()
            asked = [TopicPartition(*where, OFFSET_END) for where, each in self._positions.items() if each.needs_end()]
            for found in self._consumer.offsets_for_times(asked, timeout=_ANSWER_S) if asked else ():
                where = PartitionId(found.topic, found.partition)
                if found.error is None and not self._positions[where].set_end(found.offset, at_ns):
                    raise StalledError(f"partition={found.topic}/{found.partition}")
        except KafkaException as exc:  # time stands still until Kafka answers
            logger.debug("cannot get the ends of partitions: %s", exc)

    def _add_partitions(self) -> None:
        found = self._topics.partitions(self._consumer, with_leader=True)
        new = [where for each in found if (where := PartitionId(each.topic, each.partition)) not in self._positions]
        firsts = self._firsts(new)
        for where in new:
            if where not in firsts:
                logger.info("reading new partition=%s/%d", *where)
            reached_ns = self.decided_ns
            if where.topic == self._topics.heartbeats:
                self._engine.hosts.next, reached_ns = firsts.get(where, 0), 0
            self._positions[where] = Position(firsts.get(where, 0), reached_ns)
        self._consumer.incremental_assign([TopicPartition(*where, self._positions[where].next) for where in new])


def _decided_ns(metadata: str | None, now_ns: int) -> int:
    """Return the time in committed metadata, which another program may have written; 0 if there is none."""
    try:
        found = parse_json(metadata or "{}")
        at_ns = found.get("decided_ns", 0)
        return min(now_ns, at_ns) if type(at_ns) is int and at_ns > 0 else 0
    except (ValueError, AttributeError):
        return 0
