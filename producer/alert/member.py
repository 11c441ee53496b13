"""A member of the consumer group: active, or a standby.

The group subscribes to the topic tcp_alerts, and the owner of its partition 0 is active: it reads all topics, outside
the group, and sends alerts. Once a second it decides what it can, sends the changes, and commits the time up to which
it has decided. The next active member starts from this time and the last alert of each group (tcp_alerts): it reads the
records since some time before, and decides again what its predecessor had decided but not committed, without sending
anything twice.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from producer.alert.last_alerts import last_alerts
from producer.alert.model import Alert, Counts, Sink
from producer.alert.reading import Reading, StalledError, topics_of
from producer.alert.retry import Sleep
from producer.alert.status import AlertStatus
from producer.config.librdkafka import consumer_settings
from producer.config.load import Config, client_files, is_renewed
from producer.consume.decode import Decoder
from producer.errors import PermissionDenied, Stopped, UnavailableError
from producer.health.board import StatusBoard
from producer.host.log_limit import LogLimit
from producer.host.signals import Flag
from producer.kafka.admin import Admin
from producer.kafka.confluent import ClientErrors, open_client
from producer.kafka.consumer import topic_error
from producer.kafka.wording import REPEAT_LOG_S, grant

logger = logging.getLogger(__name__)

_STEP_S = 1.0
_POLL_S = 0.2
_ANSWER_S = 10.0
_COMMIT_S = 60.0
"""How long librdkafka waits for an answer."""
_CLOSE_S = 5.0
_AT_ONCE = 1000
"""Most alerts per call of a sink, to bound its requests."""
_DEFAULTS = {
    # How soon a standby takes over from a killed member: librdkafka's 45 s are long for alerts.
    "session.timeout.ms": "10000",
    "heartbeat.interval.ms": "2000",
}


class _Revoked(Exception):
    """Another member became active while this one waited for a sink."""


class Member:
    """Reads records and sends alerts while it is active. `open_sinks` creates the sinks, given a sleep function.

    `from_beginning`: if the group has committed nothing, start with the earliest records instead of now.
    """

    def __init__(
        self,
        config: Config,
        brokers: str,
        open_sinks: Callable[[Sleep], Sequence[Sink]],
        stop: Flag,
        board: StatusBoard | None = None,
        *,
        from_beginning: bool,
    ) -> None:
        self.counts = Counts()
        self._config, self._brokers, self._stop = config, brokers, stop
        self._files = client_files(config.kafka.settings)
        self._board = board
        self._from_beginning = from_beginning
        self._topics = topics_of(config)
        self._decoder = Decoder(config.registry, stop=stop)
        self._is_owner = False
        self._next_commit = 0.0
        self._log_limit = LogLimit(REPEAT_LOG_S)
        self._reading: Reading | None = None
        self._next_repeat = 0.0
        self._errors = ClientErrors(brokers, log=True)
        self._group = _consumer(config, brokers, self._errors, self._on_commit)
        self._sinks = open_sinks(self._wait)

    def run(self, duration_s: float | None) -> None:
        """Alert until `stop` is set or `duration_s` has passed."""
        end = None if duration_s is None else time.monotonic() + duration_s
        try:
            with suppress(Stopped):
                self._topics.require(self._group)
                Admin(self._config).require_write(self._topics.alerts)
                self._group.subscribe(
                    [self._topics.alerts], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
                )
                logger.info("ready brokers=%s group=%s", self._brokers, self._config.alert.group)
                self._loop(end)
        except KafkaException as exc:
            self._group.poll(0)  # takes the errors that say more than that there was no response
            raise self._errors.worded(exc) from exc
        finally:
            self._stand_by()
            self._close()
            for sink in self._sinks:
                sink.close()

    def _loop(self, end: float | None) -> None:
        next_step = time.monotonic()
        while not self._stop.is_set() and (end is None or time.monotonic() < end):
            self._serve_group(0.0 if self._is_owner else _POLL_S)
            if self._is_owner and self._reading is None:
                self._activate()
            if self._reading is not None:
                self._reading.read(_POLL_S)
            if time.monotonic() >= next_step:
                next_step = time.monotonic() + _STEP_S
                self._step()
        if not self._stop.is_set():  # otherwise, the next active member takes it
            self._step()

    def _step(self) -> None:
        self._check_files()
        if self._reading is not None:
            try:
                changes = self._reading.decide()
                self._send(changes)
                self._commit(self._reading)
            except _Revoked:
                logger.info("another member became active: it sends the pending alerts")
            except StalledError as stalled:
                logger.warning("alert: reading again with a new client, since the old one is stuck at %s", stalled)
                self._stand_by()
        self._publish()

    def _check_files(self) -> None:
        """End after an error if certificates or secrets were renewed since clients read them: they do so only once."""
        if self._errors.reason and is_renewed(self._config.kafka.settings, self._files):
            raise UnavailableError("certificates or secrets of [kafka.settings] were renewed: start again to use them")

    def _publish(self) -> None:
        if self._board is not None:
            self._board.step(cast("Callable[[], Any]", self._status))  # the endpoint needs as_dict() alone

    def _status(self) -> AlertStatus:
        if (reading := self._reading) is None:
            return AlertStatus(self.counts)
        return AlertStatus(
            self.counts,
            is_active=True,
            lag_s=reading.lag_s,
            lag_messages=reading.lag_messages,
            firing=len(reading.firing),
        )

    def _send(self, changes: list[Alert]) -> None:
        for at in range(0, len(changes), _AT_ONCE):
            for sink in self._sinks:
                sink.send(changes[at : at + _AT_ONCE])
        if time.monotonic() >= self._next_repeat and self._reading is not None:
            self._next_repeat = time.monotonic() + self._config.alert.repeat_s
            firing = self._reading.firing
            for at in range(0, len(firing), _AT_ONCE):
                for sink in self._sinks:
                    sink.repeat(firing[at : at + _AT_ONCE])

    def _commit(self, reading: Reading) -> None:
        """Commit, unless Kafka has yet to answer the last time: nothing here may wait for a broker that hangs."""
        if time.monotonic() < self._next_commit:
            return
        metadata = json.dumps({"decided_ns": reading.decided_ns})
        offsets = [TopicPartition(topic, number, offset, metadata) for (topic, number), offset in reading.positions()]
        try:
            self._group.commit(offsets=offsets, asynchronous=True)
            self._next_commit = time.monotonic() + _COMMIT_S
        except KafkaException as exc:
            self._on_commit(exc.args[0], [])

    def _on_commit(self, error: KafkaError | None, _: list[TopicPartition]) -> None:
        """Note that Kafka has answered. The next active member repeats what was not committed, without effect."""
        self._next_commit = 0.0
        if error is not None:
            logger.warning("cannot commit offsets: %s", error.str())

    def _close(self) -> None:
        """Leave the group; a client that waits for a broker, which may hang, is left to the end of the process."""
        closing = threading.Thread(target=self._group.close, name="kafka-close", daemon=True)
        try:
            closing.start()
        except RuntimeError:  # the limit on threads
            self._group.close()
        else:
            closing.join(_CLOSE_S)

    def _activate(self) -> None:
        """Start to read, from what the group has committed."""
        alerts = last_alerts(self._brokers, self._topics.alerts, self._config.kafka.settings, self._decoder)
        committed = self._group.committed(self._topics.partitions(self._group), timeout=_ANSWER_S)
        self._reading = Reading(self._config, self._brokers, self._topics, alerts, self._decoder, self.counts)
        self._reading.start(committed, from_beginning=self._from_beginning)
        logger.info("active decided_ns=%d firing=%d", self._reading.decided_ns, len(self._reading.firing))

    def _stand_by(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _wait(self, seconds: float) -> None:
        """Sleep for a sink's retry, and stay in the group meanwhile; raise if the retries must end."""
        end = time.monotonic() + seconds
        while True:
            self._publish()
            self._check_files()
            if self._stop.is_set():
                raise Stopped
            self._serve_group(max(0.0, min(_POLL_S, end - time.monotonic())))
            if self._reading is None:
                raise _Revoked
            if time.monotonic() >= end:
                return

    def _serve_group(self, seconds: float) -> None:
        message: Message | None = self._group.poll(seconds)
        error = message.error() if message is not None else None
        if error is None:
            return
        group = self._config.alert.group
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            fix = grant(f"--group {group}", "--operation READ")
            raise PermissionDenied(f"group {group}: this user may not join it: {fix}")
        if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise topic_error(self._topics.alerts, error)
        if error.fatal():
            raise UnavailableError(f"group {group}: {error.str()}")
        if self._log_limit.allows(error.name()):
            is_foreign = error.code() == KafkaError.INCONSISTENT_GROUP_PROTOCOL
            fix = " (another program has this group: set alert.group)" if is_foreign else ""
            logger.warning("group %s: %s error=%s%s", group, error.str(), error.name(), fix)

    def _on_assign(self, _: Consumer, assigned: list[TopicPartition]) -> None:
        self._is_owner |= any(each.partition == 0 for each in assigned)

    def _on_revoke(self, _: Consumer, revoked: list[TopicPartition]) -> None:
        if any(each.partition == 0 for each in revoked):
            self._is_owner = False
            self._stand_by()
            logger.info("standby: no longer active")


def _consumer(config: Config, brokers: str, errors: ClientErrors, on_commit: Callable[..., None]) -> Consumer:
    settings = {
        **_DEFAULTS,
        **consumer_settings(brokers, config.kafka.settings),
        "group.id": config.alert.group,
        # All members must have the same. This one leaves the active member active when a standby joins or leaves.
        "partition.assignment.strategy": "cooperative-sticky",
        "auto.offset.reset": "latest",  # messages of this topic are ignored
        "enable.auto.offset.store": "false",
        "error_cb": errors,
        "on_commit": on_commit,
    }
    return open_client(Consumer, settings)
