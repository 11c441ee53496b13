"""A member of the group that alerts: has a share of the partitions, and runs both stages over them.

Who takes a partition over does again what was not committed, and it comes to the same (cycle.py). So there is nothing
to save when partitions are taken away: what was not committed is forgotten.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from producer.alert.assignment import Shares
from producer.alert.commit import Cycle, Parts, Place
from producer.alert.last_alerts import last_alerts
from producer.alert.model import Alert, Sink
from producer.alert.partitions import Counts, Part, SumsPart
from producer.alert.retry import Wait
from producer.alert.topics import topics_of
from producer.alert.writer import TopicWriter
from producer.config.librdkafka import client_settings, consumer_settings
from producer.config.load import Config
from producer.consume.decode import Decoder
from producer.errors import ConfigError, Stopped, UnavailableError
from producer.host.signals import Flag
from producer.kafka.consumer import client_logger
from producer.schemas import ALERT_FILE, ALERT_ID, HEARTBEAT_FILE, HEARTBEAT_ID, load_schema

logger = logging.getLogger(__name__)

_CYCLE_S = 1.0
_POLL_S = 0.2
_BATCH = 1000
_ANSWER_S = 10.0
_DEFAULTS = {
    # How soon a partition that is added is seen and read; librdkafka's 5 minutes of its events would be left out.
    "topic.metadata.refresh.interval.ms": "10000",
    # Until the others take over what a member that was killed had; librdkafka's 45 s are long for alerts.
    "session.timeout.ms": "10000",
    "heartbeat.interval.ms": "2000",
    "socket.keepalive.enable": "true",
    # Ours are in no transaction, and one that somebody leaves open would hide them.
    "isolation.level": "read_uncommitted",
}
_FINAL = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
    }
)

_FIXED_SCHEMAS = {HEARTBEAT_ID: load_schema(HEARTBEAT_FILE), ALERT_ID: load_schema(ALERT_FILE)}


class _Stopped(Exception):
    """The member is to end, and a sink or Kafka does not take what is ready."""


class _Lost(Exception):
    """The partitions that what is ready came from were taken away meanwhile."""


class _Failed(Exception):
    """What Kafka failed in while a sink waits, which is not the sink's failure: it is not to try again."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class Member:
    """Reads and alerts. `open_sinks` makes the sinks, of a way to wait.

    `from_beginning`: where nothing is committed, from the oldest event on and not from the next.
    """

    def __init__(
        self,
        config: Config,
        brokers: str,
        open_sinks: Callable[[Wait], Sequence[Sink]],
        stop: Flag,
        *,
        from_beginning: bool,
    ) -> None:
        self.counts = Counts()
        self._config = config
        self._brokers = brokers
        self._stop = stop
        self._topics = topics_of(config)
        self._decoder = Decoder(config.registry, _FIXED_SCHEMAS, stop=stop)
        self._shares = Shares(
            config.alert, self._topics, self._decoder, self.counts, self._known, from_beginning=from_beginning
        )
        self._parts: dict[Place, Part] = {}
        self._share = 0
        """Which: another number after each time that partitions came or went."""
        self._waiting: list[Message] = []
        self._next_repeat = 0.0
        self._is_ready = False
        self._trouble: KafkaError | None = None
        self._consumer = _consumer(config, brokers, self._meet)
        self._writer = TopicWriter(client_settings(brokers, config.kafka.settings), self._topics.sums, self._wait)
        self._sinks = open_sinks(self._wait)

    def run(self, duration_s: float | None) -> None:
        """Read and alert until `stop` is set or the time is over."""
        try:
            partitions = self._shares.partitions(self._consumer)[self._topics.sums]
            cycle = Cycle(self._writer, partitions, self._sinks, self._commit)
            self._consumer.subscribe(
                self._topics.read, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
            )
            self._loop(cycle, None if duration_s is None else time.monotonic() + duration_s)
        except KafkaException as exc:
            reason = self._trouble or exc.args[0]
            raise UnavailableError(f"Kafka at {self._brokers}: {reason.str()}") from exc
        finally:
            self._consumer.close()
            self._writer.give_up()
            for sink in self._sinks:
                sink.close()

    def _loop(self, cycle: Cycle, end: float | None) -> None:
        next_cycle = time.monotonic()
        try:
            while not self._stop.is_set() and (end is None or time.monotonic() < end):
                messages, self._waiting = self._waiting, []
                self._take(messages or self._consumer.consume(_BATCH, _POLL_S))
                if time.monotonic() >= next_cycle:
                    self._go_round(cycle)
                    next_cycle = time.monotonic() + _CYCLE_S
            self._go_round(cycle)
        except (_Stopped, Stopped):
            logger.warning("stopped with alerts that were not taken: the next start goes on before them")
        except _Failed as failed:
            raise failed.cause from None

    def _take(self, messages: Iterable[Message]) -> None:
        now_ns = time.time_ns()
        for message in messages:
            error = message.error()
            part = self._parts.get(Place(message.topic() or "", message.partition() or 0))
            if error is None:
                if part is not None:
                    part.put(message.value(), message.offset() or 0, now_ns)
            elif error.code() == KafkaError._PARTITION_EOF:
                if part is not None:
                    part.end(message.offset() or 0)
            elif error.fatal() or error.code() in _FINAL:
                raise UnavailableError(f"topic {message.topic()}: {error.str()}")
            else:
                logger.debug("topic=%s: %s", message.topic(), error.str())

    def _go_round(self, cycle: Cycle) -> None:
        try:
            self._look_for_ends()
            self.counts.alerts += cycle.run(self._parts)
            if time.monotonic() >= self._next_repeat:
                self._next_repeat = time.monotonic() + self._config.alert.repeat_s
                cycle.repeat(self._parts)
        except _Lost:
            logger.info("partitions were taken away while alerts waited: who has them now goes on before them")

    def _look_for_ends(self) -> None:
        """Ask where partitions end now, once what was asked before is reached."""
        at_ns = time.time_ns()
        asked = [
            TopicPartition(*place, OFFSET_END)
            for place, part in self._parts.items()
            if part.until is None and not isinstance(part, SumsPart)
        ]
        if not asked:
            return
        try:
            for found in self._consumer.offsets_for_times(asked, timeout=_ANSWER_S):
                if found.error is None:
                    self._parts[Place(found.topic, found.partition)].until = (found.offset, at_ns)
        except KafkaException as exc:  # time stands still until Kafka answers
            logger.debug("no ends of partitions: %s", exc)

    def _commit(self, parts: Parts) -> None:
        ends = {place: part.committed() for place, part in parts.items()}
        offsets = [TopicPartition(*place, end.offset, end.metadata) for place, end in ends.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as exc:  # who reads it again finds that it is out
            logger.warning("offsets are not committed: %s", exc.args[0].str())

    def _wait(self, seconds: float) -> None:
        """Let Kafka know that this member lives, while a sink waits; raise where it is to give up."""
        try:
            self._poll(seconds)
        except (KafkaException, UnavailableError) as exc:  # of a share that cannot be taken, too
            raise _Failed(exc) from exc

    def _poll(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        share = self._share
        self._consumer.pause(self._consumer.assignment())
        try:
            while True:
                if self._stop.is_set():
                    raise _Stopped
                message = self._consumer.poll(max(0.0, min(_POLL_S, end - time.monotonic())))
                if message is not None:
                    self._waiting.append(message)
                if share != self._share:
                    raise _Lost
                if time.monotonic() >= end:
                    return
        finally:
            self._consumer.resume(self._consumer.assignment())

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        self._share += 1
        self._waiting = []  # of an earlier share: they are read again by whoever has them now
        self._parts, fresh = self._shares.take(consumer, assigned) if assigned else ({}, set())
        # At once: who takes over from here on must not begin at a later end.
        if fresh:
            self._commit({place: self._parts[place] for place in fresh})
        consumer.assign([TopicPartition(*place, part.next) for place, part in self._parts.items()])
        self._tell()

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self._share += 1
        self._waiting = []
        self._parts = {}

    def _tell(self) -> None:
        partitions = ",".join(f"{place.topic}/{place.number}" for place in sorted(self._parts)) or "none"
        if self._is_ready:
            logger.info("assigned partitions=%s", partitions)
        else:
            self._is_ready = True
            logger.info("ready brokers=%s group=%s partitions=%s", self._brokers, self._config.alert.group, partitions)

    def _known(self) -> list[Alert]:
        if self._topics.alerts is None:
            return []
        return last_alerts(self._brokers, self._topics.alerts, self._config.kafka.settings, self._decoder)

    def _meet(self, error: KafkaError) -> None:
        known = self._trouble is not None and self._trouble.code() == error.code()
        self._trouble = error
        if not known:
            logger.warning("kafka: %s", error.str())


def _consumer(config: Config, brokers: str, meet: Callable[[KafkaError], None]) -> Consumer:
    settings: dict[str, Any] = {
        **_DEFAULTS,
        **consumer_settings(config.kafka.settings),
        "bootstrap.servers": brokers,
        "group.id": config.alert.group,
        # All members must have the same; each topic's partitions are spread over all of them.
        "partition.assignment.strategy": "roundrobin",
        "allow.auto.create.topics": False,
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        "error_cb": meet,
    }
    try:
        return Consumer(settings, logger=client_logger(logger))
    except KafkaException as exc:
        raise ConfigError(f"the Kafka client's settings: {exc.args[0].str()}") from exc
