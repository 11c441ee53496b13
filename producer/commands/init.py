"""`rebpf init`: create the topics and register the schemas."""

from producer.config.load import Config
from producer.events import ALERTS, HEARTBEATS, STREAMS, Feed
from producer.kafka.admin import DAY_MS, Admin, in_partitions, topic_settings
from producer.registry.published import schemas_by_topic
from producer.registry.schema_ids import COMPATIBILITY, SchemaIds
from producer.topics import topic

# How long the last alert of each group is kept, from which the next active member learns what fires. A group that
# fires for longer is forgotten at the next start, and alerted on again.
_ALERT_SETTINGS = {"cleanup.policy": "compact,delete", "retention.ms": str(90 * DAY_MS)}


def create_topics(config: Config, partitions: int, replication: int, *, alerts: bool = False) -> list[str]:
    """Create missing topics, with `alerts` also that of `rebpf alert`; return a line about each.

    Raises UnavailableError if one cannot be created.
    """
    admin = Admin(config)
    admin.require_reachable()  # faster than the timeout of a request
    lines = []
    for feed in _feeds(config, alerts=alerts):
        # One partition is enough for heartbeats: a thousand hosts send a hundred small records per second. It keeps the
        # few alerts in order of time. And consumers that use event time, such as Flink, wait for idle partitions.
        name, count = topic(config, feed), partitions if feed in STREAMS else 1
        over = _ALERT_SETTINGS if feed == ALERTS else getattr(config.topics, feed.name)
        settings = {**topic_settings(replication, feed.name), **over}
        if admin.create(name, count, replication, settings):
            said = " ".join(f"{key}={value}" for key, value in settings.items())
            lines.append(f"topic {name}: created, {in_partitions(count)}, replication {replication}, {said}")
        else:
            lines.append(f"topic {name}: exists, unchanged")
    return lines


def register_schemas(config: Config, *, alerts: bool = False) -> list[str]:
    """Register the schemas if a registry is configured, as compatible both ways; with `alerts` also that of alerts.

    Return a line about each.
    """
    feeds = _feeds(config, alerts=alerts)
    if config.registry.url is None:
        ids = ", ".join(f"{topic(config, feed)} {feed.fixed_schema_id}" for feed in feeds)
        return [f"no registry: schema ids are {ids}"]
    registry = SchemaIds(config.registry, cache=None)
    lines = []
    for name, schema in schemas_by_topic(config, feeds).items():
        registry.set_compatibility(name)
        lines.append(f"schema {name}-value: id {registry.register(name, schema)}, {COMPATIBILITY}")
    return lines


def _feeds(config: Config, *, alerts: bool) -> list[Feed]:
    return [*config.capture.streams, HEARTBEATS, *([ALERTS] if alerts else [])]
