"""Builds a run of the producer from its configuration."""

import mmap
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address

from producer.agent.reload import ConfigReader, InForce
from producer.agent.runtime import Runtime
from producer.agent.streams import StreamBuilder, has_undelivered
from producer.agent.wakeup import Wakeup
from producer.config.load import Config
from producer.errors import PermissionDenied, UnavailableError
from producer.events import HEARTBEATS, STREAMS, SchemaId, Stream, Topic
from producer.health.balance import Balance
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.heartbeat import HeartbeatEncoder
from producer.health.web_config import WebSettings
from producer.host import capabilities, endpoints, signals
from producer.host.cgroups import cgroup2_root
from producer.host.clock import boot_id
from producer.host.signals import Flag
from producer.host.state import STATUS_SOCKET, StateFolder
from producer.kafka.sink import KafkaSink, producer_settings
from producer.kernel import bpf_syscall, fdstore
from producer.kernel.capture import Capture
from producer.kernel.fdstore import FdStore
from producer.kernel.loader import check_descriptor_limit
from producer.kernel.pinned import PinFolder
from producer.kernel.sequence import EventNumbers
from producer.kernel.settings import CaptureSettings
from producer.registry.published import schema_ids
from producer.rules.resolve import Ruleset, resolve
from producer.spool.quarantine import Quarantine
from producer.topics import topic


def run(
    config: Config, reader: ConfigReader, stop: Flag, reload: Flag, duration_s: float | None = None
) -> dict[Topic, Balance]:
    """Capture until `stop` is set or `duration_s` has passed; return the balance of each topic.

    `config` is what `reader` has read. Setting `reload` reads it again and clears the flag. Raises subclasses of
    RebpfError. After a return, hooks stay attached only if systemd holds them; after an error, only if they are pinned
    or systemd holds them.
    """
    with ExitStack() as stack:
        return build(config, reader, stop, stack).run(stop, reload, duration_s)


def build(config: Config, reader: ConfigReader, stop: Flag, stack: ExitStack) -> Runtime:
    """Load and attach the hooks, connect to Kafka, recover each stream, and open the endpoint. `stack` closes it all.

    Setting `stop` ends the wait for the registry.
    """
    capabilities.require_loading()  # first: without them, later steps fail less clearly
    check_descriptor_limit()
    settings = producer_settings(config.kafka.brokers, config.kafka.settings)
    web = WebSettings(config.metrics.web_config_file)
    folder = stack.enter_context(StateFolder(config.state_dir))
    ids = _schema_ids(config, stop)
    root = cgroup2_root()
    ruleset = resolve(config, root)
    capture, ring_stays = _load(config, ruleset, stack)
    captured = config.capture.streams
    # A stream that is off is needed until the events that an earlier run left are delivered.
    streams = [each for each in STREAMS if each in captured or has_undelivered(config, capture, each)]
    if len(streams) > len(captured):
        ids = _schema_ids(config, stop, streams)
    topics = {stream.name: topic(config, stream) for stream in streams}
    quarantine = Quarantine(config)
    stack.callback(quarantine.close)
    beat_topic = topic(config, HEARTBEATS)
    heartbeats = HeartbeatEncoder(ids[beat_topic]) if beat_topic in ids else None
    beats = {HEARTBEATS.name: beat_topic} if heartbeats else {}
    sink = KafkaSink(settings, topics | beats, on_socket=capture.exclude_socket, quarantine=quarantine.put)
    # Attach before the client connects: the programs recognize a local broker by the SYN that they see.
    capture.attach()
    brokers = sink.open()
    stack.callback(sink.close)
    if config.kafka.brokers is None:
        _exclude_test_broker(capture, brokers)
    builder = StreamBuilder(config, capture, {name: ids[each] for name, each in topics.items()}, stack, quarantine)
    parts = [builder.build(stream) for stream in streams]
    capture.drop_old_rings()
    rings = {stream.name: capture.ring_descriptor(stream) for stream in streams}
    wakeup = stack.enter_context(Wakeup(rings, signals.descriptor()))
    board = StatusBoard(wake=wakeup.call)
    endpoint = stack.enter_context(_endpoint(config, board, web)) if config.metrics.listen else None
    in_force = InForce(capture.rules, config, ruleset, reader, root)
    outside = folder, in_force, web, board, wakeup, heartbeats, brokers, endpoint
    return Runtime(topics, capture, sink, parts, builder.relabel, *outside, ring_stays)


def _schema_ids(config: Config, stop: Flag, streams: Sequence[Stream] = ()) -> dict[Topic, SchemaId]:
    """Return the schema ids. Raises UnavailableError also for a registry that rejects us.

    It may accept us later, without a change on this host, so the service has to be started again.
    """
    try:
        return schema_ids(config, stop, streams)
    except PermissionDenied as error:
        raise UnavailableError(str(error)) from error


def _load(config: Config, ruleset: Ruleset, stack: ExitStack) -> tuple[Capture, bool]:
    """Load the hooks or take them over, and drop capabilities; return them, and whether they outlive a stop."""
    handover = _handover_store(config)
    if handover:
        stack.enter_context(handover)
    numbers = EventNumbers(config.state_dir, boot_id(), bpf_syscall.possible_cpus())
    capture = stack.enter_context(Capture(_capture_settings(config, ruleset), handover, numbers))
    capture.load()
    # The loader's child keeps what attaching needs. Drop before the client and the endpoint start threads: each thread
    # has capabilities of its own, which it would keep.
    capabilities.drop_unneeded(lambda: capture.sequence(STREAMS[0]))
    return capture, handover is not None and handover.outlives_stop


def _handover_store(config: Config) -> PinFolder | FdStore | None:
    """Return the store that holds hooks and rings for the next start, if there is one."""
    if config.capture.pin is None:
        return FdStore() if fdstore.available() else None
    if fdstore.available():
        with FdStore() as store:  # an earlier run without a pin folder may have filled it
            store.clear()
    return PinFolder(config.capture.pin)


def _endpoint(config: Config, board: StatusBoard, web: WebSettings) -> Endpoint:
    host, port = endpoints.split(config.metrics.listen)
    local = config.state_dir / STATUS_SOCKET if config.metrics.web_config_file else None
    return Endpoint(host, port, board, web, local)


def _capture_settings(config: Config, ruleset: Ruleset) -> CaptureSettings:
    capture = config.capture
    ring_bytes = {
        stream.ring: getattr(capture, f"{stream.name}_ring_bytes") if stream in capture.streams else mmap.PAGESIZE
        for stream in STREAMS
    }
    return CaptureSettings(
        hooks=capture.hooks,
        streams=capture.streams,
        ring_bytes=ring_bytes,
        rules=ruleset.tables(),
        btf=capture.btf,
        programs=capture.programs,
        cache=config.state_dir / "compiled",
    )


def _exclude_test_broker(capture: Capture, brokers: str) -> None:
    """Exclude the traffic of the test broker's listeners."""
    for broker in brokers.split(","):
        host, port = endpoints.split(broker)
        capture.exclude_listener(ip_address(host), port)
