"""`rebpf init`: create the topics and register the schemas."""

from collections.abc import Mapping

from producer.config.load import Config
from producer.events import ALERTS, HEARTBEATS, Feed
from producer.kafka.admin import DAY_MS, Admin, in_partitions, topic_settings
from producer.registry.published import published_schemas, schema_ids
from producer.registry.schema_ids import COMPATIBILITY, SchemaIds
from producer.schemas import ALERT_FILE, ALERT_ID, load_schema
from producer.topics import topic

# One is enough: a thousand hosts send a hundred small records per second. And consumers that use event time, such as
# Flink, wait for idle partitions.
_HEARTBEAT_PARTITIONS = 1
_ALERT_PARTITIONS = 1  # alerts are few, and one partition keeps them in order of time
# How long the last alert of each group is kept, from which the next active member learns what fires. A group that
# fires for longer is forgotten at the next start, and alerted on again.
_ALERT_SETTINGS = {"cleanup.policy": "compact,delete", "retention.ms": str(90 * DAY_MS)}


def create_topics(config: Config, partitions: int, replication: int, *, alerts: bool = False) -> list[str]:
    """Create missing topics, with `alerts` also those of `rebpf alert`; return a line about each.

    Raises UnavailableError if one cannot be created.
    """
    admin = Admin(config)
    admin.require_reachable()  # faster than the timeout of a request
    wanted: dict[str, tuple[int, Mapping[str, str]]] = {
        topic(config, stream): (partitions, _settings(config, stream, replication)) for stream in config.capture.streams
    }
    wanted[topic(config, HEARTBEATS)] = (_HEARTBEAT_PARTITIONS, _settings(config, HEARTBEATS, replication))
    if alerts:
        usual = topic_settings(replication)
        wanted[topic(config, ALERTS)] = (_ALERT_PARTITIONS, {**usual, **_ALERT_SETTINGS})
    lines = []
    for name, (count, settings) in wanted.items():
        if admin.create(name, count, replication, settings):
            said = " ".join(f"{key}={value}" for key, value in settings.items())
            lines.append(f"topic {name}: created, {in_partitions(count)}, replication {replication}, {said}")
        else:
            lines.append(f"topic {name}: exists, unchanged")
    return lines


def _settings(config: Config, feed: Feed, replication: int) -> dict[str, str]:
    """Return the settings of a feed's topic: the defaults, and over them those of the configuration."""
    return {**topic_settings(replication, feed.name), **getattr(config.topics, feed.name)}


def register_schemas(config: Config, *, alerts: bool = False) -> list[str]:
    """Register the schemas if a registry is configured, as compatible both ways; with `alerts` also that of alerts.

    Return a line about each.
    """
    alerts_name = topic(config, ALERTS)
    if config.registry.url is None:
        ids = {**schema_ids(config), **({alerts_name: ALERT_ID} if alerts else {})}
        return ["no registry: schema ids are " + ", ".join(f"{name} {number}" for name, number in ids.items())]
    schemas = {**published_schemas(config), **({alerts_name: load_schema(ALERT_FILE)} if alerts else {})}
    registry = SchemaIds(config.registry, cache=None)
    lines = []
    for name, schema in schemas.items():
        registry.set_compatibility(name)
        lines.append(f"schema {name}-value: id {registry.register(name, schema)}, {COMPATIBILITY}")
    return lines
