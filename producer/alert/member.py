"""A member of the consumer group: runs both stages over its assigned partitions.

The next owner of a partition repeats what was not committed, with the same result (commit.py). So a member saves
nothing when partitions are revoked; it drops their uncommitted state.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from producer.alert.assignment import Assigner
from producer.alert.commit import Assigned, CommitStep, PartitionId
from producer.alert.last_alerts import last_alerts
from producer.alert.model import Alert, Sink
from producer.alert.partitions import Counts, Partition, SumsPartition
from producer.alert.retry import Sleep
from producer.alert.topics import topics_of
from producer.alert.writer import TopicWriter
from producer.config.librdkafka import client_settings, consumer_settings
from producer.config.load import Config
from producer.consume.decode import Decoder
from producer.consume.reader import by_partition
from producer.errors import Stopped, UnavailableError
from producer.host.signals import Flag
from producer.kafka.confluent import ClientErrors, open_client
from producer.schemas import ALERT_FILE, ALERT_ID, HEARTBEAT_FILE, HEARTBEAT_ID, load_schema

logger = logging.getLogger(__name__)

_STEP_S = 1.0
_POLL_S = 0.2
_BATCH = 10_000
_ANSWER_S = 10.0
_DEFAULTS = {
    # How soon an added partition is read: with librdkafka's 5 minutes, as much of its events would be skipped.
    "topic.metadata.refresh.interval.ms": "10000",
    # How soon others take over from a killed member: librdkafka's 45 s are long for alerts.
    "session.timeout.ms": "10000",
    "heartbeat.interval.ms": "2000",
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
    """The member must stop while waiting for a sink or Kafka."""


class _Revoked(Exception):
    """Partitions were revoked while waiting for a sink or Kafka."""


class _Failed(Exception):
    """The consumer failed while a sink waited. Not an error of the sink, which must not retry."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class Member:
    """Reads events and sends alerts. `open_sinks` creates the sinks, given a sleep function for their retries.

    `from_beginning`: start partitions without a committed offset at their earliest event instead of at their end.
    """

    def __init__(
        self,
        config: Config,
        brokers: str,
        open_sinks: Callable[[Sleep], Sequence[Sink]],
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
        self._assigner = Assigner(
            config.alert, self._topics, self._decoder, self.counts, self._last_alerts, from_beginning=from_beginning
        )
        self._assigned: dict[PartitionId, Partition] = {}
        self._generation = 0
        """Changes with each assignment and revocation."""
        self._unhandled: list[Message] = []
        self._next_repeat = 0.0
        self._is_ready = False
        self._errors = ClientErrors(brokers, log=True)
        self._consumer = _consumer(config, brokers, self._errors)
        self._writer = TopicWriter(client_settings(brokers, config.kafka.settings), self._topics.sums, self._wait)
        self._sinks = open_sinks(self._wait)

    def run(self, duration_s: float | None) -> None:
        """Read and alert until `stop` is set or `duration_s` has passed."""
        try:
            partitions = self._assigner.partition_counts(self._consumer)[self._topics.sums]
            step = CommitStep(self._writer, partitions, self._sinks, self._commit)
            self._consumer.subscribe(
                self._topics.read, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
            )
            self._loop(step, None if duration_s is None else time.monotonic() + duration_s)
        except KafkaException as exc:
            raise self._errors.worded(exc) from exc
        finally:
            self._consumer.close()
            self._writer.discard()
            for sink in self._sinks:
                sink.close()

    def _loop(self, step: CommitStep, end: float | None) -> None:
        next_step = time.monotonic()
        try:
            while not self._stop.is_set() and (end is None or time.monotonic() < end):
                messages, self._unhandled = self._unhandled, []
                self._take(messages or self._consumer.consume(_BATCH, _POLL_S))
                if time.monotonic() >= next_step:
                    self._run_step(step)
                    next_step = time.monotonic() + _STEP_S
            self._run_step(step)
        except (_Stopped, Stopped):
            logger.warning("stopped with alerts pending: the next start will resend them")
        except _Failed as failed:
            raise failed.cause from None

    def _take(self, messages: list[Message]) -> None:
        now_ns = time.time_ns()
        for (topic, number), run in by_partition(messages):
            partition = self._assigned.get(PartitionId(topic, number))
            error = run[-1].error()
            if error is not None:
                end = run.pop()
            if run and partition is not None:
                offsets = np.fromiter(cast("Iterator[int]", map(Message.offset, run)), np.int64, len(run))
                partition.put(list(map(Message.value, run)), offsets, now_ns)
            if error is None:
                continue
            if error.code() == KafkaError._PARTITION_EOF:
                if partition is not None:
                    partition.end(end.offset() or 0)
            elif error.fatal() or error.code() in _FINAL:
                raise UnavailableError(f"topic {topic}: {error.str()}")
            else:
                logger.debug("topic=%s: %s", topic, error.str())

    def _run_step(self, step: CommitStep) -> None:
        try:
            self._request_ends()
            self.counts.alerts += step.run(self._assigned)
            if time.monotonic() >= self._next_repeat:
                self._next_repeat = time.monotonic() + self._config.alert.repeat_s
                step.repeat(self._assigned)
        except _Revoked:
            logger.info("partitions revoked with alerts pending: the new owner will resend them")

    def _request_ends(self) -> None:
        """Request the current end of each partition that has been read to its last known end."""
        at_ns = time.time_ns()
        asked = [
            TopicPartition(*partition_id, OFFSET_END)
            for partition_id, partition in self._assigned.items()
            if partition.until is None and not isinstance(partition, SumsPartition)
        ]
        if not asked:
            return
        try:
            for found in self._consumer.offsets_for_times(asked, timeout=_ANSWER_S):
                if found.error is None:
                    self._assigned[PartitionId(found.topic, found.partition)].until = (found.offset, at_ns)
        except KafkaException as exc:  # time stands still until Kafka answers
            logger.debug("cannot get the ends of partitions: %s", exc)

    def _commit(self, assigned: Assigned) -> None:
        ends = {partition_id: partition.committed() for partition_id, partition in assigned.items()}
        offsets = [TopicPartition(*partition_id, end.offset, end.metadata) for partition_id, end in ends.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as exc:  # the next owner repeats it, without effect
            logger.warning("cannot commit offsets: %s", exc.args[0].str())

    def _wait(self, seconds: float) -> None:
        """Sleep for a sink's retry, and stay in the group meanwhile; raise if the retries must end."""
        try:
            self._poll(seconds)
        except (KafkaException, UnavailableError) as exc:  # also from on_assign
            raise _Failed(exc) from exc

    def _poll(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        generation = self._generation
        self._consumer.pause(self._consumer.assignment())
        try:
            while True:
                if self._stop.is_set():
                    raise _Stopped
                message = self._consumer.poll(max(0.0, min(_POLL_S, end - time.monotonic())))
                if message is not None:
                    self._unhandled.append(message)
                if generation != self._generation:
                    raise _Revoked
                if time.monotonic() >= end:
                    return
        finally:
            self._consumer.resume(self._consumer.assignment())

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        self._generation += 1
        self._unhandled = []  # from an earlier assignment; their new owner reads them
        self._assigned, fresh = self._assigner.build(consumer, assigned) if assigned else ({}, set())
        # Now, so that the next owner does not start at a later end.
        if fresh:
            self._commit({partition_id: self._assigned[partition_id] for partition_id in fresh})
        consumer.assign(
            [TopicPartition(*partition_id, partition.next) for partition_id, partition in self._assigned.items()]
        )
        self._log_assignment()

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self._generation += 1
        self._unhandled = []
        self._assigned = {}

    def _log_assignment(self) -> None:
        partitions = (
            ",".join(f"{partition_id.topic}/{partition_id.number}" for partition_id in sorted(self._assigned)) or "none"
        )
        if self._is_ready:
            logger.info("assigned partitions=%s", partitions)
        else:
            self._is_ready = True
            logger.info("ready brokers=%s group=%s partitions=%s", self._brokers, self._config.alert.group, partitions)

    def _last_alerts(self) -> list[Alert]:
        if self._topics.alerts is None:
            return []
        return last_alerts(self._brokers, self._topics.alerts, self._config.kafka.settings, self._decoder)


def _consumer(config: Config, brokers: str, errors: ClientErrors) -> Consumer:
    settings = {
        **_DEFAULTS,
        **consumer_settings(brokers, config.kafka.settings),
        "group.id": config.alert.group,
        # All members must have the same; each topic's partitions are spread over all of them.
        "partition.assignment.strategy": "roundrobin",
        "enable.auto.offset.store": "false",
        "enable.partition.eof": "true",
        "error_cb": errors,
    }
    return open_client(Consumer, settings)
