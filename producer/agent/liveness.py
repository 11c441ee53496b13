"""Shows others that the loop runs, and logs losses and the reasons for being degraded."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from producer.events import HEARTBEATS, EncodedBatch, Topic
from producer.health.balance import Balance
from producer.health.board import StatusBoard
from producer.health.heartbeat import INTERVAL_S, HeartbeatEncoder
from producer.health.status import Status, summary
from producer.host import systemd
from producer.host.log_limit import LogLimit
from producer.kafka.sink import KafkaSink

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0
_REPEAT_REASON_S = 60.0


class Liveness:
    """Shows that the loop runs: on the status board, to systemd's watchdog, and by heartbeats."""

    def __init__(
        self, board: StatusBoard, heartbeats: HeartbeatEncoder | None, sink: KafkaSink, status: Callable[[], Status]
    ) -> None:
        self._board = board
        self._heartbeats = heartbeats
        self._sink = sink
        self._status = status
        self._heartbeat_at = 0.0
        self._watchdog = systemd.Watchdog()
        self._log_limit = LogLimit(systemd.REPEAT_LOG_S)

    def note(self) -> None:
        """Note a step of the loop. This cannot fail, so that no defect of the status looks like a loop that hangs."""
        self._board.note()
        self._watchdog.step(time.monotonic())

    def step(self) -> None:
        """Publish the status if someone waits for it, and send a heartbeat if one is due."""
        self._board.step(self._status)
        if time.monotonic() >= self._heartbeat_at:
            self._heartbeat_at = time.monotonic() + INTERVAL_S
            status = self._publish(self._status())
            # One at a time: older heartbeats are of no use when Kafka is back.
            if not self._sink.in_flight[HEARTBEATS.name]:
                self._send(status)

    def last(self) -> None:
        """Send the heartbeat that reports the stop."""
        self._send(self._publish(dataclasses.replace(self._status(), stopped=True)))

    def _publish(self, status: Status) -> Status:
        self._board.publish(status)
        systemd.try_notify("", summary(status), limit=self._log_limit)
        return status

    def _send(self, status: Status) -> None:
        if self._heartbeats:
            self._sink.send(EncodedBatch.of(HEARTBEATS, *self._heartbeats.encode(status, time.time())))


class LossReporter:
    """Logs new losses and the reasons for being degraded, without repeating itself too often."""

    def __init__(self) -> None:
        self._reported: dict[Topic, Mapping[str, int]] = {}
        self._reasons = LogLimit(_REPEAT_REASON_S)
        self._healthy_from = 0.0
        self._next = 0.0

    def log_reasons(self, reasons: Sequence[str]) -> None:
        """Log each reason when it appears, repeat it while it lasts, and log the recovery."""
        now = time.monotonic()
        if reasons:
            self._healthy_from = now + _INTERVAL_S
        for reason in reasons:
            if self._reasons.allows(reason):
                logger.warning("degraded: %s", reason)
        if self._reasons.has_logged and now >= self._healthy_from:
            self._reasons.clear()
            logger.info("recovered: no longer degraded")

    def due(self) -> bool:
        """Whether it is time to compare the balances."""
        return time.monotonic() >= self._next

    def log_losses(self, balances: Mapping[Topic, Balance]) -> None:
        """Log each balance whose losses have changed, or that does not add up."""
        self._next = time.monotonic() + _INTERVAL_S
        for name, balance in balances.items():
            if balance.unaccounted:  # a bug
                logger.error("%d events are unaccounted for topic=%s %s", balance.unaccounted, name, balance)
            if balance.lost != self._reported.get(name, {}):
                logger.warning("events lost so far topic=%s %s", name, balance)
                self._reported[name] = balance.lost
