"""The producer as a whole: builds the parts, runs them until it is told to stop, and gives the account."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from producer.agent.reload import RulesInForce
from producer.agent.report import Reporter
from producer.agent.streams import Quarantine, StreamBuilder, StreamParts
from producer.agent.supervise import StuckError, Supervisor
from producer.config.load import Config
from producer.errors import PermissionDenied
from producer.events import STREAMS, Topic
from producer.health import metrics
from producer.health.balance import Balance
from producer.health.endpoint import Board, Endpoint
from producer.health.heartbeat import INTERVAL_S, HeartbeatEncoder
from producer.health.status import Status, summary
from producer.health.web_config import WebSettings
from producer.host import capabilities, systemd
from producer.host.clock import UtcOffset, boot_id
from producer.host.signals import Flag
from producer.host.state import STATUS_SOCKET, StateFolder
from producer.kafka.sink import KafkaSink, producer_settings
from producer.kernel import bpf_syscall, fdstore
from producer.kernel.capture import Hooks, HookSettings
from producer.kernel.fdstore import FdStore
from producer.kernel.hooks import cgroup2_root
from producer.kernel.pinned import PinFolder
from producer.kernel.sequence import EventNumbers
from producer.pipeline.pipeline import Pipeline
from producer.registry.published import schema_ids
from producer.rules.resolve import Ruleset, resolve
from producer.topics import heartbeat_topic, topic

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 5.0
_LAST_BEAT_S = 1.0
_PUT_BY_S = 5.0
_REPEAT_REASON_S = 60.0
_MOST_REASONS = 64


class Agent:
    """One run of the producer; `read` reads the configuration anew for a reload, which changes the rules alone."""

    def __init__(self, config: Config, read: Callable[[], Config]) -> None:
        self._config = config
        self._read = read
        self._topics = {stream.name: topic(config, stream) for stream in STREAMS}

    def run(self, stop: Flag, reload: Flag, duration_s: float | None = None) -> dict[Topic, Balance]:
        """Capture until `stop` is set or `duration_s` has passed; return the balance of each topic.

        When `reload` is set, the rules are read anew, and it is cleared. Raises RebpfError's kinds. Nothing stays
        attached after a return, unless systemd keeps it; after an error, only what is kept.
        """
        config = self._config
        if capabilities.missing(capabilities.LOADING):  # before anything that an unprivileged user cannot do either
            raise PermissionDenied("loading BPF programs needs root, or the capabilities CAP_BPF and CAP_PERFMON")
        settings = producer_settings(config.kafka.brokers, config.kafka.settings)
        web = WebSettings(config.metrics.web_config_file)
        with ExitStack() as stack:
            folder = stack.enter_context(StateFolder(config.state_dir))
            ids = schema_ids(config, stop)
            root = cgroup2_root()
            ruleset = resolve(config, root)
            keeper = _keeper(config)
            if keeper:
                stack.enter_context(keeper)
            numbers = EventNumbers(config.state_dir, boot_id(), bpf_syscall.possible_cpus())
            hooks = stack.enter_context(Hooks(_hook_settings(config, ruleset), keeper, numbers))
            hooks.load()
            # The loader's child has what attaching needs. Before the client and the endpoint start threads, which would
            # keep what it has now.
            capabilities.drop_all()
            quarantine = Quarantine(config)
            stack.callback(quarantine.close)
            beats = HeartbeatEncoder(ids[heartbeat_topic(config)]) if heartbeat_topic(config) in ids else None
            sink = KafkaSink(
                settings,
                self._topics,
                on_socket=hooks.exclude_socket,
                quarantine=quarantine.put,
                heartbeats=heartbeat_topic(config) if beats else None,
            )
            # Before the client connects: the programs know the other end of a connection by the SYN that they see.
            hooks.attach()
            brokers = sink.open()
            stack.callback(sink.close)
            if config.kafka.brokers is None:
                _exclude_embedded(hooks, brokers)
            builder = StreamBuilder(
                config, hooks, {name: ids[each] for name, each in self._topics.items()}, stack, quarantine
            )
            parts = [builder.build(stream) for stream in STREAMS]
            hooks.drop_old_rings()
            board = Board()
            endpoint = stack.enter_context(_endpoint(config, board, web)) if config.metrics.listen else None
            rules = RulesInForce(hooks, config, ruleset, self._read, root)
            facts: dict[str, Any] = {
                "brokers": brokers,
                "registry": config.registry.url,
                "topics": self._topics,
                "status_url": endpoint and endpoint.url,
                "status_socket": config.metrics.web_config_file is not None,
            }
            reporter = Reporter(config.host, hooks, sink, parts, self._topics)

            supervisor = Supervisor()

            def between() -> None:
                supervisor.attempt("reload", lambda: rules.follow(reload), None)
                supervisor.attempt("cgroups", rules.look, None)
                facts.update(rules_version=rules.version, reloads=rules.reloads, reload_refused=rules.refusal)
                supervisor.attempt("publish", lambda: folder.publish_if_new({**facts}), None)

            def status() -> Status:
                reasons = [f"reload refused: {rules.refusal}"] if rules.refusal else []
                reasons += [web.last_error] if web.last_error else []
                return reporter.status(rules.version, [*supervisor.reasons, *reasons])

            between()
            self._say_ready(hooks, brokers)
            run = _Run(
                config,
                hooks,
                sink,
                parts,
                reporter,
                _Pulse(board, beats, sink, status),
                supervisor,
                ring_stays=keeper is not None and keeper.outlives_stop,
            )
            return run.until(stop, between, duration_s)

    def _say_ready(self, hooks: Hooks, brokers: str) -> None:
        if hooks.refusals:
            reasons = (f"{refusal.stream} by {refusal.rung}: {refusal.reason}" for refusal in hooks.refusals)
            logger.info("better hooks are not available: %s", "; ".join(reasons))
        rungs = " ".join(f"{name}={rung}" for name, rung in hooks.rungs.items())
        embedded = " embedded=true" if self._config.kafka.brokers is None else ""
        taken_over = " taken_over=true" if hooks.taken_over else ""
        cached = " cached=true" if hooks.cached else ""
        logger.info("ready brokers=%s%s%s%s %s", brokers, embedded, taken_over, cached, rungs)
        systemd.notify("READY=1", status=f"capturing: {rungs}")


class _Pulse:
    """What tells others that the loop lives: the status board, systemd's watchdog and the heartbeat."""

    def __init__(
        self, board: Board, beats: HeartbeatEncoder | None, sink: KafkaSink, status: Callable[[], Status]
    ) -> None:
        self._board = board
        self._beats = beats
        self._sink = sink
        self._status = status
        self._beat_at = 0.0
        self._watchdog = systemd.Watchdog()

    def step(self) -> None:
        """Note a step of the loop, and send a heartbeat when it is time."""
        self._board.step(self._status)
        self._watchdog.step(time.monotonic(), lambda: summary(self._status()))
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + INTERVAL_S
            self._beat(self._status())

    def last(self) -> bool:
        """Send the heartbeat that says that the producer stops; return whether there are heartbeats."""
        self._beat(dataclasses.replace(self._status(), stopped=True))
        return self._beats is not None

    def _beat(self, status: Status) -> None:
        self._board.publish(status)
        if self._beats:
            self._sink.beat(*self._beats.encode(status, time.time()))


@dataclass(frozen=True, slots=True)
class _Run:
    """The parts of a run, and their loop."""

    config: Config
    hooks: Hooks
    sink: KafkaSink
    parts: list[StreamParts]
    reporter: Reporter
    pulse: _Pulse
    supervisor: Supervisor
    ring_stays: bool
    """Whether hooks and rings outlive a stop, for a next start to go on from."""

    def until(self, stop: Flag, between: Callable[[], None], duration_s: float | None) -> dict[Topic, Balance]:
        """Move events until `stop` is set or the time is over, end in good order, and return the balances."""
        paths = [each.path for each in self.parts]
        pipeline = Pipeline(paths, self.sink, time.monotonic, UtcOffset(), metrics.observe_delivery, self._guard)
        interval_s = self.config.capture.drain_interval_s
        end = float("inf") if duration_s is None else time.monotonic() + duration_s
        watch, attempt = _Watch(), self.supervisor.attempt
        while not stop.is_set() and time.monotonic() < end:
            between()
            attempt("status", self.pulse.step, None)
            attempt("watch", lambda: self._watch(watch), None)
            if not self._move(pipeline):
                stop.wait(min(interval_s, max(0.0, end - time.monotonic())))
        systemd.try_notify("STOPPING=1")
        deadline = time.monotonic() + self.config.kafka.stop_timeout_s
        if not self.ring_stays:
            self.hooks.detach()
        self._drain(pipeline, deadline)
        return self._end(pipeline, deadline)

    def _watch(self, watch: "_Watch") -> None:
        watch.tell(self.reporter.reasons())
        if watch.due():
            watch.look(self.reporter.balances())
            self._expire()

    def _guard(self, stream: str, work: Callable[[], bool]) -> bool:
        return self.supervisor.attempt(f"pipeline {stream}", work, False, vital=True)

    def _move(self, pipeline: Pipeline) -> bool:
        """Move events on; where that fails for too long, log the balance and end. The next start continues."""
        try:
            return self.supervisor.attempt("pipeline", pipeline.step, False, vital=True)
        except StuckError:
            for name, balance in self.reporter.balances().items():
                logger.error("balance topic=%s %s", name, balance)
            raise

    def _expire(self) -> None:
        for each in self.parts:
            if each.spool:
                try:
                    each.spool.expire()
                except OSError as error:
                    logger.warning("spool: %s", error)

    def _drain(self, pipeline: Pipeline, deadline: float) -> None:
        """Wait until Kafka has what is under way and what is in the ring, but not for ever.

        A ring that stays may never be empty: of that, what is there now.
        """
        while pipeline.step() and time.monotonic() < deadline:
            pass
        while time.monotonic() < deadline:
            balances = self.reporter.balances().values()
            if not any(each.in_flight or (each.in_ring and not self.ring_stays) for each in balances):
                return
            if any(each.path.spooling for each in self.parts):
                return  # Kafka does not take them
            self.supervisor.attempt("status", self.pulse.step, None)
            time.sleep(self.config.capture.drain_interval_s / 5)
            if self.ring_stays:
                pipeline.settle()
            else:
                pipeline.step()

    def _end(self, pipeline: Pipeline, deadline: float) -> dict[Topic, Balance]:
        """Put what is left on disk; what cannot be put there is lost, unless its ring stays."""
        balances = self.reporter.balances()
        if any(each.in_flight or (each.in_ring and not self.ring_stays) for each in balances.values()):
            pipeline.put_all_by(time.monotonic() + _PUT_BY_S if self.ring_stays else float("inf"))
        elif self.pulse.last():
            until = min(deadline, time.monotonic() + _LAST_BEAT_S)
            while self.sink.beating and time.monotonic() < until:
                pipeline.settle()
                time.sleep(0.01)
        final = {}
        for each, name in zip(self.parts, balances, strict=True):
            kernel = self.hooks.counters(each.stream)  # once: a ring that stays goes on
            unread = self.reporter.balance(each, kernel).in_ring
            spooled, in_ring = each.path.end(self.sink, unread, ring_stays=self.ring_stays)
            now = self.reporter.balance(each, kernel)
            last = dataclasses.replace(now, in_flight=0, spooled=spooled, in_ring=in_ring)
            if last.lost.get("stopped"):
                logger.error("stop: %d events lost topic=%s", last.lost["stopped"], name)
            if last.spooled:
                logger.warning("stop: %d events wait on disk for the next start topic=%s", last.spooled, name)
            final[name] = last
        return final


class _Watch:
    """Tells the operator of new losses, and of what is not as it should be, once in a while."""

    def __init__(self) -> None:
        self._told: dict[Topic, Mapping[str, int]] = {}
        self._reasons: dict[str, float] = {}
        """What was not as it should be, and when the operator was told of it."""
        self._well_from = 0.0
        self._next = 0.0

    def tell(self, reasons: Sequence[str]) -> None:
        """Log each reason when it comes, again now and then while it is there, and when all are gone for a while."""
        now = time.monotonic()
        if reasons:
            self._well_from = now + _WATCH_INTERVAL_S
        for reason in reasons:
            if now >= self._reasons.get(reason, -_REPEAT_REASON_S) + _REPEAT_REASON_S and self._may_tell(now):
                self._reasons[reason] = now
                logger.warning("degraded: %s", reason)
        if self._reasons and now >= self._well_from:
            self._reasons.clear()
            logger.info("all is as it should be again")

    def _may_tell(self, now: float) -> bool:
        """Forget reasons that were told long ago; return whether there is room: texts that change have no end."""
        if len(self._reasons) >= _MOST_REASONS:
            self._reasons = {each: told for each, told in self._reasons.items() if now < told + _REPEAT_REASON_S}
        return len(self._reasons) < _MOST_REASONS

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._next

    def look(self, balances: Mapping[Topic, Balance]) -> None:
        """Log what is lost, where that is more than before."""
        self._next = time.monotonic() + _WATCH_INTERVAL_S
        for name, balance in balances.items():
            if balance.unaccounted:  # a defect
                logger.error("%d events are unaccounted for topic=%s %s", balance.unaccounted, name, balance)
            if balance.lost != self._told.get(name, {}):
                logger.warning("events lost so far topic=%s %s", name, balance)
                self._told[name] = balance.lost


def _keeper(config: Config) -> PinFolder | FdStore | None:
    """Return what keeps hooks and rings when this process ends."""
    if config.capture.pin is None:
        return FdStore() if fdstore.available() else None
    if fdstore.available():
        with FdStore() as store:  # from a run that did not pin
            store.clear()
    return PinFolder(config.capture.pin)


def _endpoint(config: Config, board: Board, web: WebSettings) -> Endpoint:
    host, _, port = config.metrics.listen.rpartition(":")
    local = config.state_dir / STATUS_SOCKET if config.metrics.web_config_file else None
    return Endpoint(host.strip("[]"), int(port), board, web, local)


def _hook_settings(config: Config, ruleset: Ruleset) -> HookSettings:
    capture = config.capture
    return HookSettings(
        hooks=capture.hooks,
        ring_bytes={"transmit_pipe": capture.transmit_ring_bytes, "retransmit_pipe": capture.retransmit_ring_bytes},
        rules=ruleset.tables(),
        btf=capture.btf,
        compiled=config.state_dir / "compiled",
    )


def _exclude_embedded(hooks: Hooks, brokers: str) -> None:
    """Keep what the embedded cluster's listeners send out of the events."""
    for broker in brokers.split(","):
        host, _, port = broker.rpartition(":")
        hooks.exclude_listener(ip_address(host), int(port))
