"""`rebpf init`: create the topics and register the schemas."""

from collections.abc import Mapping

from producer.config.load import Config
from producer.events import STREAMS
from producer.kafka.admin import DAY_MS, Admin, in_partitions, topic_settings
from producer.registry.published import published_schemas, schema_ids
from producer.registry.schema_ids import COMPATIBILITY, SchemaIds
from producer.schemas import ALERT_FILE, ALERT_ID, load_schema
from producer.topics import alert_topics, heartbeat_topic, topic

# One: a thousand hosts send a hundred small records a second, and a consumer that works with event time (Flink) waits
# for partitions in which nothing comes.
_HEARTBEAT_PARTITIONS = 1
_ALERT_PARTITIONS = 1  # there are few, and a reader of one partition sees them in the order of time
# The last alert of each group stays for so long: a member that takes over learns from it what fires. A group that has
# fired for longer is forgotten at the next start, and alert_topic anew.
_ALERT_SETTINGS = {"cleanup.policy": "compact,delete", "retention.ms": str(90 * DAY_MS)}
# A window's sums are needed until it is decided.
_SUMS_SETTINGS = {"retention.ms": str(DAY_MS)}


def create_topics(config: Config, partitions: int, replication: int, *, alerts: bool = False) -> list[str]:
    """Create the topics that do not exist, with `alerts` those of `rebpf alert` too; return a line about each.

    UnavailableError says what failed.
    """
    admin = Admin(config)
    admin.require_reachable()  # known sooner than that a request is not answered
    usual = topic_settings(replication)
    wanted: dict[str, tuple[int, Mapping[str, str]]] = {
        topic(config, stream): (partitions, usual) for stream in STREAMS
    }
    wanted[heartbeat_topic(config)] = (_HEARTBEAT_PARTITIONS, usual)
    if alerts:
        alert_topic, sums = alert_topics(config)
        wanted[alert_topic] = (_ALERT_PARTITIONS, {**usual, **_ALERT_SETTINGS})
        wanted[sums] = (partitions, {**usual, **_SUMS_SETTINGS})
    lines = []
    for name, (count, settings) in wanted.items():
        if admin.create(name, count, replication, settings):
            said = " ".join(f"{key}={value}" for key, value in settings.items())
            lines.append(f"topic {name}: created, {in_partitions(count)}, replication {replication}, {said}")
        else:
            lines.append(f"topic {name}: exists, and is left as it is")
    return lines


def register_schemas(config: Config, *, alerts: bool = False) -> list[str]:
    """Register the schemas where a registry is configured, compatible both ways, with `alerts` that of alerts too.

    Return a line about each.
    """
    alert_topic, _ = alert_topics(config)
    if config.registry.url is None:
        ids = {**schema_ids(config), **({alert_topic: ALERT_ID} if alerts else {})}
        return ["no registry: schema ids are " + ", ".join(f"{name} {number}" for name, number in ids.items())]
    schemas = {**published_schemas(config), **({alert_topic: load_schema(ALERT_FILE)} if alerts else {})}
    with SchemaIds(config.registry, cache=None) as registry:
        lines = []
        for name, schema in schemas.items():
            registry.set_compatibility(name)
            lines.append(f"schema {name}-value: id {registry.register(name, schema)}, {COMPATIBILITY}")
        return lines
