"""This version's schema of each topic that the configuration uses, and its id."""

from collections.abc import Sequence

from producer.config.load import Config
from producer.events import SchemaId, Stream, Topic
from producer.host.signals import Flag
from producer.registry.client import AvroSchema
from producer.registry.schema_ids import SchemaIds
from producer.schemas import HEARTBEAT_FILE, HEARTBEAT_ID, load_schema
from producer.topics import heartbeat_topic, topic


def schema_ids(config: Config, stop: Flag | None = None, streams: Sequence[Stream] = ()) -> dict[Topic, SchemaId]:
    """Return the id of each topic's schema: from the registry, or the fixed one if none is configured.

    The topics are those of `streams`, by default the captured ones, and that of the heartbeats. The latter's id is
    omitted if unavailable, since events do not depend on it. `stop` ends the wait.
    """
    streams = streams or config.capture.streams
    if config.registry.url is None:
        fixed = {topic(config, stream): stream.fixed_schema_id for stream in streams}
        return {**fixed, heartbeat_topic(config): HEARTBEAT_ID}
    registry = SchemaIds(config.registry, config.state_dir / "schema_ids.json", stop=stop)
    return registry.find(_event_schemas(config, streams), optional=_heartbeat_schemas(config))


def published_schemas(config: Config) -> dict[Topic, AvroSchema]:
    """Return this version's schema of each topic."""
    return {**_event_schemas(config, config.capture.streams), **_heartbeat_schemas(config)}


def _event_schemas(config: Config, streams: Sequence[Stream]) -> dict[Topic, AvroSchema]:
    return {topic(config, stream): load_schema(stream.schema_file) for stream in streams}


def _heartbeat_schemas(config: Config) -> dict[Topic, AvroSchema]:
    return {heartbeat_topic(config): load_schema(HEARTBEAT_FILE)}
