"""What Kafka and the registry offer a producer, and what is missing with what mends it."""

from collections.abc import Iterator

from producer.commands.finding import Finding
from producer.config.load import Config
from producer.errors import PermissionDenied, RebpfError, SchemaError, UnavailableError
from producer.events import STREAMS
from producer.kafka.admin import Admin, TopicFacts, in_partitions
from producer.registry.published import published_schemas
from producer.registry.schema_ids import SchemaIds
from producer.topics import heartbeat_topic, topic

_LEAST_MESSAGE_BYTES = 1000
"""An event takes some 400 bytes with its frame and key, and long names of host and cgroup take more."""


def kafka(config: Config) -> Iterator[Finding]:
    """Examine the brokers and the topics."""
    if config.kafka.brokers is None:
        yield Finding("Kafka", "no brokers are configured: the embedded broker will run, for trying only")
        return
    events = [topic(config, stream) for stream in STREAMS]
    heartbeats = heartbeat_topic(config)
    try:
        admin = Admin(config)
        admin.demand_reachable()  # known sooner than that a request is not answered
        brokers = admin.brokers()
        topics = admin.describe([*events, heartbeats])
    except RebpfError as error:
        yield Finding("Kafka", str(error), error.exit_code)
        return
    yield Finding("Kafka", f"{config.kafka.brokers}, {brokers} broker{'s' if brokers > 1 else ''}")
    for name in events:
        yield from _topic(name, topics[name], brokers)
        yield from _compaction(name, topics[name])
    for finding in _topic(heartbeats, topics[heartbeats], brokers):
        if finding.exit_code:
            yield Finding(finding.subject, f"{finding.text}; till then no heartbeats are sent", available=False)
        else:
            yield finding
    counts = {facts.partitions for facts in (topics[name] for name in events) if isinstance(facts, TopicFacts)}
    if len(counts) > 1:
        some, many = min(counts), max(counts)
        text = f"{some} and {many} partitions: a connection's transmits and retransmits are in different ones, and "
        text += f"joins break: kafka-topics.sh --alter --partitions {many} --topic, of the topic that has {some}"
        yield Finding("topics", text, warns=True)


def _topic(name: str, facts: TopicFacts | RebpfError, brokers: int) -> Iterator[Finding]:
    subject = f"topic {name}"
    if isinstance(facts, RebpfError):
        yield Finding(subject, str(facts), facts.exit_code)
        return
    alter = f"kafka-configs.sh --alter --entity-type topics --entity-name {name} --add-config"
    if not facts.may_write:
        text = (
            f"this user may not write to it: kafka-acls.sh --add --producer --topic {name} --allow-principal User:NAME"
        )
        yield Finding(subject, text, PermissionDenied.exit_code)
    size = facts.number("max.message.bytes")
    if size is not None and size < _LEAST_MESSAGE_BYTES:
        text = f"max.message.bytes is {size}, and no event fits: {alter} max.message.bytes=1048588"
        yield Finding(subject, text, UnavailableError.exit_code)
    in_sync = facts.number("min.insync.replicas")
    if in_sync is not None and in_sync > facts.replication:
        text = f"min.insync.replicas is {in_sync} with {facts.replication} replicas, so that it takes no event"
        text += f": {alter} min.insync.replicas={max(1, facts.replication - 1)}"
        yield Finding(subject, text, UnavailableError.exit_code)
    if facts.replication == 1 and brokers > 1:
        text = f"one replica on {brokers} brokers: with its broker go its events; "
        text += "kafka-reassign-partitions.sh gives it more, or delete it and `rebpf init --replication 3`"
        yield Finding(subject, text, warns=True)
    text = in_partitions(facts.partitions)
    yield Finding(subject, text if facts.settings else f"{text}; its settings are not shown to this user")


def _compaction(name: str, facts: TopicFacts | RebpfError) -> Iterator[Finding]:
    """The key is the flow: of a flow's events compaction leaves the last."""
    policy = "" if isinstance(facts, RebpfError) else facts.settings.get("cleanup.policy", "")
    if "compact" in policy:
        text = f"cleanup.policy is {policy}, and of each flow all events but the last go: kafka-configs.sh --alter "
        text += f"--entity-type topics --entity-name {name} --add-config cleanup.policy=delete"
        yield Finding(f"topic {name}", text, warns=True)


def registry(config: Config) -> Iterator[Finding]:
    """Examine the registry, and each topic's schema there."""
    if config.registry.url is None:
        return
    heartbeats = heartbeat_topic(config)
    try:
        with SchemaIds(config.registry, cache=None, attempts=1) as schemas:
            for name, schema in published_schemas(config).items():
                subject = f"schema {name}-value"
                try:
                    if not schemas.compatible(name, schema):
                        text = f"registry {config.registry.url} has others there, with which this version's is "
                        text += "incompatible: use another kafka.topic_prefix, or delete the subject and `rebpf init`"
                        yield Finding(
                            subject, text, 0 if name == heartbeats else SchemaError.exit_code, available=False
                        )
                        continue
                    number = schemas.look_up(name, schema)
                except SchemaError as error:
                    needed = name != heartbeats and not config.registry.register
                    yield Finding(subject, str(error), error.exit_code if needed else 0, available=False)
                else:
                    yield Finding(subject, f"id {number}")
    except PermissionDenied as error:
        mend = "put USER:PASSWORD into the file that registry.auth names, or see registry.certificate"
        yield Finding("registry", f"{error}; {mend}", error.exit_code)
    except UnavailableError as error:
        mend = f"see registry.url, and the way there: curl -f {config.registry.url}/subjects"
        yield Finding("registry", f"{error}; {mend}", error.exit_code)
    except RebpfError as error:
        yield Finding("registry", str(error), error.exit_code)
