"""This version's schema of each topic, and its id."""

from producer.config.load import Config
from producer.events import STREAMS, SchemaId, Topic
from producer.host.signals import Flag
from producer.registry.client import AvroSchema
from producer.registry.schema_ids import SchemaIds
from producer.schemas import HEARTBEAT_FILE, HEARTBEAT_ID, load_schema
from producer.topics import heartbeat_topic, topic


def schema_ids(config: Config, stop: Flag | None = None) -> dict[Topic, SchemaId]:
    """Return the id of each topic's schema: from the registry, or the fixed one if none is configured.

    The heartbeat's id is omitted if unavailable, since events do not depend on it. `stop` ends the wait.
    """
    if config.registry.url is None:
        fixed = {topic(config, stream): stream.fixed_schema_id for stream in STREAMS}
        return {**fixed, heartbeat_topic(config): HEARTBEAT_ID}
    with SchemaIds(config.registry, config.state_dir / "schema_ids.json", stop=stop) as registry:
        return registry.find(_event_schemas(config), optional=_heartbeat_schemas(config))


def published_schemas(config: Config) -> dict[Topic, AvroSchema]:
    """Return this version's schema of each topic."""
    return {**_event_schemas(config), **_heartbeat_schemas(config)}


def _event_schemas(config: Config) -> dict[Topic, AvroSchema]:
    return {topic(config, stream): load_schema(stream.schema_file) for stream in STREAMS}


def _heartbeat_schemas(config: Config) -> dict[Topic, AvroSchema]:
    return {heartbeat_topic(config): load_schema(HEARTBEAT_FILE)}
