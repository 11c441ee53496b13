"""A run of the producer: the loop, the shutdown, and the final balance."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from producer.agent.flow_timer import FlowTimer
from producer.agent.liveness import Liveness, LossReporter
from producer.agent.reload import InForce
from producer.agent.report import Reporter
from producer.agent.streams import StreamParts
from producer.agent.supervise import StuckError, Supervisor
from producer.agent.wakeup import Wakeup
from producer.config.load import Config
from producer.events import FLOWS, HEARTBEATS, TRANSMITS, Topic
from producer.health import metrics
from producer.health.balance import Balance
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.heartbeat import HeartbeatEncoder
from producer.health.status import Status
from producer.health.web_config import WebSettings
from producer.host import memory, systemd
from producer.host.clock import UtcOffset
from producer.host.signals import Flag
from producer.host.state import StateFolder
from producer.kafka.sink import KafkaSink
from producer.kernel.capture import Capture
from producer.pipeline.budget import TransmitBudget
from producer.pipeline.pace import LEAST_S
from producer.pipeline.pipeline import Pipeline

logger = logging.getLogger(__name__)

_CHORES_S = 1.0
_CHORES_EARLY_S = 0.25
_RETRY_S = 0.1
_LAST_HEARTBEAT_S = 1.0
_SPILL_S = 5.0
_STORED_NOWHERE = "kafka.brokers is not set: events go to the in-process test broker, which stores nothing"
"""A reason for a service only, whose file has lost its content; others try things out."""


@dataclass(slots=True)
class Runtime:
    """The parts of a run, and its loop. Call `run` once."""

    topics: dict[str, Topic]
    """By the stream's name."""
    capture: Capture
    sink: KafkaSink
    streams: Sequence[StreamParts]
    relabel: Callable[[Mapping[str, str]], None]
    """Sets the labels of later events."""
    folder: StateFolder
    in_force: InForce
    web: WebSettings
    board: StatusBoard
    wakeup: Wakeup
    heartbeats: HeartbeatEncoder | None
    brokers: str
    endpoint: Endpoint | None
    ring_stays: bool
    """Whether hooks and rings outlive a stop, so that the next start continues with them."""
    supervisor: Supervisor = field(default_factory=Supervisor)
    reporter: Reporter = field(init=False)
    liveness: Liveness = field(init=False)
    losses: LossReporter = field(default_factory=LossReporter)
    budget: TransmitBudget = field(init=False)
    flows: FlowTimer | None = field(default=None, init=False)
    chores_at_s: float = 0.0
    stopping: bool = False
    """Whether a step that keeps failing may no longer end the run, since the rest of the shutdown follows."""

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.in_force.config

    def __post_init__(self) -> None:
        self.budget = TransmitBudget(self.config.capture.transmit_events_per_s)
        self.reporter = Reporter(self.in_force, self.capture, self.sink, self.streams, self.topics)
        self.liveness = Liveness(self.board, self.heartbeats, self.sink, self._status)

    def run(self, stop: Flag, reload: Flag, duration_s: float | None = None) -> dict[Topic, Balance]:
        """Move events until `stop` is set or `duration_s` has passed, shut down, and return the balances."""
        self._housekeeping(reload)
        self._log_ready()
        streams = [each.pipeline for each in self.streams]
        capture = self.config.capture
        pipeline = Pipeline(
            streams, self.sink, time.monotonic, UtcOffset(), metrics.DELIVERY.observe, self._guard,
            capture.latency_s, at_once=capture.retransmit_at_once,
        )  # fmt: skip
        self.in_force.apply = partial(self._apply, pipeline)
        end = float("inf") if duration_s is None else time.monotonic() + duration_s
        flows = self.flows = self._flow_timer()
        woken: set[str] = set()
        while not stop.wait(0) and time.monotonic() < end:
            self._do_chores(reload)
            due = min(time.monotonic() + self._move(pipeline, woken), self.chores_at_s, end)
            if flows:
                if (now_s := time.monotonic()) >= flows.due_s:
                    self.supervisor.attempt("flows", partial(flows.step, now_s), None)
                due = min(due, max(flows.due_s, now_s + LEAST_S))
            woken = self._wait(pipeline, due)
        if flows:
            flows.close()
        self.stopping = True
        systemd.try_notify("STOPPING=1")
        deadline = time.monotonic() + self.config.kafka.stop_timeout_s
        if not self.ring_stays:
            self.capture.detach()
        self._drain(pipeline, deadline)
        return self._end(pipeline, deadline)

    def _apply(self, pipeline: Pipeline, config: Config) -> None:
        """Apply what a reload has changed outside the rules (producer.config.effective.AT_RELOAD)."""
        pipeline.set_latency(config.capture.latency_s, at_once=config.capture.retransmit_at_once)
        self.budget.set(config.capture.transmit_events_per_s)
        if self.flows:
            self.flows.set_interval(config.capture.flow_interval_s)
        for each in self.streams:
            each.pipeline.spill_after_s = config.spool.spill_after_s
        self.relabel(config.labels)

    def _flow_timer(self) -> FlowTimer | None:
        parts = next((each for each in self.streams if each.stream == FLOWS), None)
        if parts is None or FLOWS not in self.config.capture.streams:
            return None
        interval_s = self.config.capture.flow_interval_s
        report, ring = self.capture.report_some_flows, parts.ring
        return FlowTimer(report, lambda: ring.fill, interval_s, self.config.host, time.monotonic())

    def _do_chores(self, reload: Flag) -> None:
        """Do the chores about once a second, however often the loop turns.

        A turn that comes shortly before does them, too, so that an idle host wakes once for both.
        """
        early_s = self.chores_at_s - time.monotonic()
        if early_s > _CHORES_EARLY_S and not (reload.is_set() or self.wakeup.called):
            return
        # For a reload's pace and its steps, and for retries.
        is_soon = reload.is_set() or self.in_force.busy or self.supervisor.reasons
        self.chores_at_s = time.monotonic() + (_RETRY_S if is_soon else _CHORES_S)
        self._housekeeping(reload)
        self.supervisor.attempt("budget", self._follow_budget, None)
        self._show_life()
        self.supervisor.attempt("watch", self._watch, None)

    def _show_life(self) -> None:
        self.liveness.note()
        self.supervisor.attempt("status", self.liveness.step, None)

    def _follow_budget(self) -> None:
        """Sample more or less of the transmits, as the budget requires."""
        if self.budget.follow(time.monotonic(), self.capture.counters(TRANSMITS).passed):
            self.capture.limit_transmits(self.budget.rate, self.budget.turn)

    def _wait(self, pipeline: Pipeline, due: float) -> set[str]:
        """Wait until `due`, or until something happens that matters; return the streams whose rings woke the loop."""
        while True:
            woken = self.wakeup.wait(due - time.monotonic())
            if not woken or self.wakeup.called or pipeline.heeds(woken):
                return woken

    def _housekeeping(self, reload: Flag) -> None:
        """Reload if asked to, follow what rules name, and publish what changed."""
        self.supervisor.attempt("reload", lambda: self.in_force.follow(reload), None)
        self.supervisor.attempt("names", self.in_force.follow_names, None)
        self.supervisor.attempt("hooks", self.capture.check, None)
        self.supervisor.attempt("publish", lambda: self.folder.publish_if_new(self._facts()), None)

    def _facts(self) -> dict[str, Any]:
        return {
            "brokers": self.brokers,
            "registry": self.config.registry.url,
            "topics": self.topics,
            "status_url": self.endpoint and self.endpoint.url,
            "status_socket": self.config.metrics.web_config_file is not None,
            "rules_version": self.in_force.version,
            "reloads": self.in_force.reloads,
            "reload_began_ns": self.in_force.began_ns,
            "reload_refused": self.in_force.refusal,
            "restart_needed": list(self.in_force.restart_needed),
        }

    def _status(self) -> Status:
        reasons = [*self.supervisor.reasons, *self.in_force.reasons]
        reasons += [self.web.last_error] if self.web.last_error else []
        if self.config.kafka.brokers is None and systemd.is_service():
            reasons.append(_STORED_NOWHERE)
        return self.reporter.status(self.budget.rate, reasons)

    def _log_ready(self) -> None:
        if self.capture.refusals:
            reasons = (f"{refusal.stream} by {refusal.hook}: {refusal.reason}" for refusal in self.capture.refusals)
            logger.info("better hooks are not available: %s", "; ".join(reasons))
        hooks = " ".join(f"{name}={hook}" for name, hook in self.capture.hooks_in_use.items())
        test_broker = " test_broker=true" if self.config.kafka.brokers is None else ""
        taken_over = " taken_over=true" if self.capture.taken_over else ""
        cached = " cached=true" if self.capture.cached else ""
        programs = f" programs={self.capture.programs_from}" if self.capture.programs_from else ""
        logger.info("ready brokers=%s%s%s%s%s %s", self.brokers, test_broker, taken_over, cached, programs, hooks)
        # A shell that a service started may still have the name of its socket.
        systemd.try_notify("READY=1", f"capturing: {hooks}", systemd.TIMEOUT_S)

    def _watch(self) -> None:
        self.losses.log_reasons(self.reporter.reasons())
        if self.losses.due():
            self.losses.log_losses(self.reporter.balances())
            self._expire()
            if self.endpoint:
                self.endpoint.open()
            memory.release()

    def _guard(self, stream: str, work: Callable[[], bool]) -> bool | None:
        return self.supervisor.attempt(f"pipeline {stream}", work, None, vital=not self.stopping)

    def _move(self, pipeline: Pipeline, woken: set[str]) -> float:
        """Run a turn of the pipeline, and return the seconds until the next one.

        If that has failed for too long, log the balance and raise StuckError.
        """
        try:
            return self.supervisor.attempt("pipeline", partial(pipeline.turn, woken), _RETRY_S, vital=True)
        except StuckError:
            for name, balance in self.reporter.balances().items():
                logger.error("balance topic=%s %s", name, balance)
            raise

    def _try(self, work: Callable[[], object]) -> object:
        """Run a part of the shutdown, which continues if it fails; return its result."""
        return self.supervisor.attempt("stop", work, None)

    def _expire(self) -> None:
        for each in self.streams:
            if each.spool:
                try:
                    each.spool.expire()
                except OSError as error:
                    logger.warning("spool: cannot delete expired files: %s", error)

    def _drain(self, pipeline: Pipeline, deadline: float) -> None:
        """Wait until Kafka has acknowledged what is in flight and in the ring, at most until the deadline.

        A ring that stays may never be empty, so only what it holds now is drained.
        """
        while self._try(pipeline.step) and time.monotonic() < deadline:
            pass
        while time.monotonic() < deadline:
            balances = self.reporter.balances().values()
            if not any(each.in_flight or (each.in_ring and not self.ring_stays) for each in balances):
                return
            if any(each.pipeline.spooling for each in self.streams):
                return  # Kafka is not taking them
            self._show_life()
            time.sleep(LEAST_S)
            self._try(pipeline.poll_reports if self.ring_stays else pipeline.step)

    def _end(self, pipeline: Pipeline, deadline: float) -> dict[Topic, Balance]:
        """Spill what is left. What the spool cannot take is lost, unless its ring stays."""
        balances = self.reporter.balances()
        if any(each.in_flight or (each.in_ring and not self.ring_stays) for each in balances.values()):
            pipeline.spill_all(time.monotonic() + _SPILL_S if self.ring_stays else float("inf"))
        else:
            self.supervisor.attempt("status", self.liveness.last, None)
            until = min(deadline, time.monotonic() + _LAST_HEARTBEAT_S)
            while self.sink.in_flight[HEARTBEATS.name] and time.monotonic() < until:
                self._try(pipeline.poll_reports)
                time.sleep(0.01)
        final = {}
        for each, name in zip(self.streams, balances, strict=True):
            kernel = self.capture.counters(each.stream)  # read once: a ring that stays keeps filling
            unread = self.reporter.balance(each, kernel).in_ring
            spooled, in_ring = each.pipeline.end(self.sink, unread, ring_stays=self.ring_stays)
            now = self.reporter.balance(each, kernel)
            last = dataclasses.replace(now, in_flight=0, spooled=spooled, in_ring=in_ring)
            if last.lost.get("stopped"):
                logger.error("stop: %d events lost topic=%s", last.lost["stopped"], name)
            if last.spooled:
                logger.warning("stop: %d events left on disk for the next start topic=%s", last.spooled, name)
            final[name] = last
        return final
