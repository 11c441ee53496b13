"""`rebpf check`: Kafka and the registry."""

from collections.abc import Iterator

from producer.commands.finding import Finding
from producer.config.load import Config
from producer.errors import PermissionDenied, RebpfError, SchemaError, UnavailableError
from producer.events import HEARTBEATS
from producer.kafka.admin import Admin, TopicInfo, in_partitions
from producer.kafka.librdkafka import check_loopback
from producer.kafka.wording import may_not_write
from producer.registry.published import schemas_by_topic
from producer.registry.schema_ids import SchemaIds
from producer.topics import topic

_LEAST_MESSAGE_BYTES = 1000
"""An event takes about 400 bytes with header and key; long names of host and cgroup add to it."""

_BATCH_BYTES = 1_000_000
"""librdkafka's default of batch.size."""


def kafka(config: Config) -> Iterator[Finding]:
    """Check the brokers and the topics."""
    if config.kafka.brokers is None:
        try:
            check_loopback()
        except UnavailableError as error:
            yield Finding("Kafka", str(error), error.exit_code)
        else:
            yield Finding("Kafka", "no brokers configured: the in-process test broker will be used")
        return
    events = [topic(config, stream) for stream in config.capture.streams]
    heartbeats = topic(config, HEARTBEATS)
    try:
        admin = Admin(config)
        admin.require_reachable()  # faster than the timeout of a request
        brokers = admin.brokers()
        topics = admin.describe([*events, heartbeats])
    except RebpfError as error:
        yield Finding("Kafka", str(error), error.exit_code)
        return
    yield Finding("Kafka", f"{config.kafka.brokers}, {brokers} broker{'s' if brokers > 1 else ''}")
    for name in events:
        yield from _topic(name, topics[name], brokers)
        yield from _compaction(name, topics[name])
        if "batch.size" not in config.kafka.settings:
            yield from batches(name, topics[name])
    for finding in _topic(heartbeats, topics[heartbeats], brokers):
        if finding.exit_code:
            yield Finding(finding.subject, f"{finding.text}; no heartbeats are sent until then", available=False)
        else:
            yield finding
    counts = {info.partitions for info in (topics[name] for name in events) if isinstance(info, TopicInfo)}
    if len(counts) > 1:
        some, many = min(counts), max(counts)
        text = f"{some} and {many} partitions: a connection's events are in different partitions of the topics, which "
        text += f"breaks joins: kafka-topics.sh --alter --partitions {many} --topic, for the topic that has {some}"
        yield Finding("topics", text, warns=True)


def _topic(name: str, info: TopicInfo | RebpfError, brokers: int) -> Iterator[Finding]:
    subject = f"topic {name}"
    if isinstance(info, RebpfError):
        yield Finding(subject, str(info), info.exit_code)
        return
    alter = f"kafka-configs.sh --alter --entity-type topics --entity-name {name} --add-config"
    if not info.may_write:
        yield Finding(subject, may_not_write(name), PermissionDenied.exit_code)
    size = info.number("max.message.bytes")
    if size is not None and size < _LEAST_MESSAGE_BYTES:
        text = f"max.message.bytes is {size}, too small for any event: {alter} max.message.bytes=1048588"
        yield Finding(subject, text, UnavailableError.exit_code)
    in_sync = info.number("min.insync.replicas")
    if in_sync is not None and in_sync > info.replication:
        text = f"min.insync.replicas is {in_sync} with {info.replication} replicas, so the topic accepts no events"
        text += f": {alter} min.insync.replicas={max(1, info.replication - 1)}"
        yield Finding(subject, text, UnavailableError.exit_code)
    if info.replication == 1 and brokers > 1:
        text = f"one replica on {brokers} brokers: its events are lost with its broker; "
        text += "add replicas with kafka-reassign-partitions.sh, or delete it and run `rebpf init --replication 3`"
        yield Finding(subject, text, warns=True)
    text = in_partitions(info.partitions)
    yield Finding(subject, text if info.settings else f"{text}; this user may not describe its settings")


def _compaction(name: str, info: TopicInfo | RebpfError) -> Iterator[Finding]:
    """Events of a host, or of a flow, share a key, of which compaction keeps only the last event."""
    policy = "" if isinstance(info, RebpfError) else info.settings.get("cleanup.policy", "")
    if "compact" in policy:
        text = f"cleanup.policy is {policy}, which keeps only the last event of each key: kafka-configs.sh --alter "
        text += f"--entity-type topics --entity-name {name} --add-config cleanup.policy=delete"
        yield Finding(f"topic {name}", text, warns=True)


def batches(name: str, info: TopicInfo | RebpfError) -> Iterator[Finding]:
    """Check that the topic takes whole batches: of one that it rejects, each message is sent alone, which is slow."""
    most = None if isinstance(info, RebpfError) else info.number("max.message.bytes")
    if most is not None and _LEAST_MESSAGE_BYTES <= most < _BATCH_BYTES:
        text = f"max.message.bytes is {most}, so a batch of up to {_BATCH_BYTES} bytes can be rejected, and each of "
        text += f'its messages sent alone: set "batch.size" = {most} in [kafka.settings]'
        yield Finding(f"topic {name}", text, warns=True)


def registry(config: Config) -> Iterator[Finding]:
    """Check the registry, and each topic's schema in it."""
    if config.registry.url is None:
        return
    heartbeats = topic(config, HEARTBEATS)
    try:
        schemas = SchemaIds(config.registry, cache=None, attempts=1)
        for name, schema in schemas_by_topic(config, [*config.capture.streams, HEARTBEATS]).items():
            subject = f"schema {name}-value"
            try:
                if not schemas.compatible(name, schema):
                    text = f"registry {config.registry.url} has schemas that are incompatible with this version's: "
                    text += "use another kafka.topic_prefix, or delete the subject and run `rebpf init`"
                    yield Finding(subject, text, 0 if name == heartbeats else SchemaError.exit_code, available=False)
                    continue
                number = schemas.look_up(name, schema)
            except SchemaError as error:
                needed = name != heartbeats and not config.registry.register
                yield Finding(subject, str(error), error.exit_code if needed else 0, available=False)
            else:
                yield Finding(subject, f"id {number}")
    except PermissionDenied as error:
        fix = "put USER:PASSWORD into the file named by registry.auth, or check registry.certificate"
        yield Finding("registry", f"{error}; {fix}", error.exit_code)
    except UnavailableError as error:
        fix = f"check registry.url, and the network: curl -f {config.registry.url}/subjects"
        yield Finding("registry", f"{error}; {fix}", error.exit_code)
    except RebpfError as error:
        yield Finding("registry", str(error), error.exit_code)
