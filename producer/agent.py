"""The producer as a whole: builds the parts, runs them until it is told to stop, and gives the account."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

from producer import privileges
from producer.balance import Balance
from producer.cgroups import CgroupPaths
from producer.config import Config
from producer.encode import BatchEncoder, load_schema
from producer.errors import PermissionDenied
from producer.events import STREAMS, SchemaId, Stream, Topic
from producer.hooks import Hooks, HookSettings
from producer.kafka import KafkaSink, client_settings
from producer.pins import PinFolder
from producer.pipeline import Path as StreamPath
from producer.pipeline import Pipeline
from producer.provision import topic
from producer.registry import SchemaIds
from producer.reload import RulesInForce
from producer.ruleset import Ruleset, resolve
from producer.rungs import cgroup2_root
from producer.state import StateFolder

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 5.0


class Agent:
    """One run of the producer; `read` reads the configuration anew for a reload, which changes the rules alone."""

    def __init__(self, config: Config, read: Callable[[], Config]) -> None:
        self._config = config
        self._read = read
        self._topics = {stream.name: topic(config, stream) for stream in STREAMS}

    def run(
        self, stop: threading.Event, reload: threading.Event, duration_s: float | None = None
    ) -> dict[Topic, Balance]:
        """Capture until `stop` is set or `duration_s` has passed; return the balance of each topic.

        When `reload` is set, the rules are read anew, and it is cleared. Raises RebpfError's kinds. Nothing stays
        attached after a return; after an error, only what is kept in a bpffs.
        """
        config = self._config
        if privileges.missing(privileges.LOADING):  # before anything that an unprivileged user cannot do either
            raise PermissionDenied("loading BPF programs needs root, or the capabilities CAP_BPF and CAP_PERFMON")
        settings = client_settings(config.kafka.brokers, config.kafka.settings)
        with ExitStack() as stack:
            folder = stack.enter_context(StateFolder(config.state_dir))
            ids = schema_ids(config)
            root = cgroup2_root()
            ruleset = resolve(config, root)
            pins = stack.enter_context(PinFolder(config.capture.pin)) if config.capture.pin else None
            hooks = stack.enter_context(Hooks(_hook_settings(config, ruleset), pins))
            hooks.load()
            # The loader's child has what attaching needs. Before the client starts threads, which would keep what it
            # has now.
            privileges.drop_all()
            sink = KafkaSink(settings, self._topics, on_socket=hooks.exclude_socket)
            brokers = sink.open()
            stack.callback(sink.close)
            if config.kafka.brokers is None:
                _exclude_embedded(hooks, brokers)
            lost = folder.lost() if hooks.taken_over else {}
            paths = [self._path(stream, hooks, ids, lost.get(stream.name, {}), stack) for stream in STREAMS]
            hooks.attach()
            rules = RulesInForce(hooks, config, ruleset, self._read, root)
            facts = {"brokers": brokers, "registry": config.registry.url, "topics": self._topics}
            folder.publish({**facts, "rules_version": rules.version})
            for refusal in hooks.refusals:
                logger.info("hook refused stream=%s hook=%s reason=%s", refusal.stream, refusal.rung, refusal.reason)
            rungs = " ".join(f"{name}={rung}" for name, rung in hooks.rungs.items())
            embedded = " embedded=true" if config.kafka.brokers is None else ""
            taken_over = " taken_over=true" if hooks.taken_over else ""
            logger.info("ready brokers=%s%s%s %s", brokers, embedded, taken_over, rungs)

            def between() -> None:
                if reload.is_set():
                    reload.clear()
                    rules.reload()
                rules.look()
                if pins:
                    folder.note_lost({path.stream.name: dict(path.lost) for path in paths})
                folder.publish_if_new({**facts, "rules_version": rules.version})

            return self._work(hooks, sink, paths, stop, between, duration_s)

    def _path(
        self,
        stream: Stream,
        hooks: Hooks,
        ids: Mapping[Topic, SchemaId],
        lost_before: Mapping[str, int],
        stack: ExitStack,
    ) -> StreamPath:
        host_fields = {
            "host": self._config.host,
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        }
        cgroups = CgroupPaths(cgroup2_root())
        schema_id = ids[self._topics[stream.name]]
        encoder = BatchEncoder(stream, load_schema(stream), schema_id, host_fields, cgroups.path)
        ring = stack.enter_context(hooks.ring(stream))
        # The kernel's counters began with the ring: what is behind its position was delivered, or lost on the way.
        delivered = ring.records_before - sum(lost_before.values())
        return StreamPath(stream, ring, encoder, delivered, Counter(lost_before))

    def _work(
        self,
        hooks: Hooks,
        sink: KafkaSink,
        paths: list[StreamPath],
        stop: threading.Event,
        between: Callable[[], None],
        duration_s: float | None,
    ) -> dict[Topic, Balance]:
        pipeline = Pipeline(paths, sink, utc_offset_ns)
        interval_s = self._config.capture.drain_interval_s
        end = float("inf") if duration_s is None else time.monotonic() + duration_s
        watch = _LossWatch()
        while not stop.is_set() and time.monotonic() < end:
            between()
            if watch.due():
                watch.look(self._balances(hooks, paths))
            if not pipeline.step():
                stop.wait(min(interval_s, max(0.0, end - time.monotonic())))
        hooks.detach()
        deadline = time.monotonic() + self._config.kafka.stop_timeout_s
        while time.monotonic() < deadline:
            if not pipeline.step():
                if not any(balance.in_flight for balance in self._balances(hooks, paths).values()):
                    break
                time.sleep(interval_s / 5)
        self._give_up(hooks, paths)
        return self._balances(hooks, paths)

    def _give_up(self, hooks: Hooks, paths: list[StreamPath]) -> None:
        """Count what is still in flight when the time for stopping is over: nobody will deliver it."""
        for path, balance in zip(paths, self._balances(hooks, paths).values(), strict=True):
            if balance.in_flight:
                path.lost["stopped"] += balance.in_flight
                logger.error("stop: %d events lost topic=%s", balance.in_flight, self._topics[path.stream.name])

    def _balances(self, hooks: Hooks, paths: list[StreamPath]) -> dict[Topic, Balance]:
        balances = {}
        for path in paths:
            kernel = hooks.counters(path.stream)
            losses = {"ring_full": kernel.ring_full, "nested": kernel.nested, **path.lost}
            lost = {reason: count for reason, count in losses.items() if count}
            passed = kernel.passed + kernel.nested
            in_flight = passed - path.delivered - sum(lost.values())
            balances[self._topics[path.stream.name]] = Balance(passed, path.delivered, in_flight, lost=lost)
        return balances


class _LossWatch:
    """Tells the operator of new losses, once in a while."""

    def __init__(self) -> None:
        self._told: dict[Topic, Mapping[str, int]] = {}
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def look(self, balances: Mapping[Topic, Balance]) -> None:
        self._next = time.monotonic() + _WATCH_INTERVAL_S
        for name, balance in balances.items():
            if balance.lost != self._told.get(name, {}):
                logger.warning("events lost so far topic=%s %s", name, balance)
                self._told[name] = balance.lost


def schema_ids(config: Config) -> dict[Topic, SchemaId]:
    """Return the id of each topic's schema: the registry's, or the fixed ones where there is none."""
    if config.registry.url is None:
        return {topic(config, stream): stream.fixed_schema_id for stream in STREAMS}
    registry = SchemaIds(config.registry, config.state_dir / "schema_ids.json")
    return registry.find({topic(config, stream): load_schema(stream) for stream in STREAMS})


def utc_offset_ns() -> int:
    """Return what CLOCK_MONOTONIC lacks to nanoseconds since 1970 UTC, now."""
    return time.time_ns() - time.monotonic_ns()


def _hook_settings(config: Config, ruleset: Ruleset) -> HookSettings:
    capture = config.capture
    return HookSettings(
        hooks=capture.hooks,
        ring_bytes={"transmit_pipe": capture.transmit_ring_bytes, "retransmit_pipe": capture.retransmit_ring_bytes},
        rules=ruleset.tables(),
        own_listeners=config.kafka.brokers is None,
        btf=capture.btf,
    )


def _exclude_embedded(hooks: Hooks, brokers: str) -> None:
    """Keep what the embedded cluster's listeners send out of the events."""
    for broker in brokers.split(","):
        host, _, port = broker.rpartition(":")
        hooks.exclude_listener(ip_address(host), int(port))
