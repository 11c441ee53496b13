"""This version's schema of each topic that the configuration uses, and its id."""

from collections.abc import Sequence

from producer.config.load import Config
from producer.events import HEARTBEATS, Feed, SchemaId, Stream, Topic
from producer.host.signals import Flag
from producer.registry.client import AvroSchema
from producer.registry.schema_ids import SchemaIds
from producer.schemas import load_schema
from producer.topics import topic


def schema_ids(config: Config, stop: Flag | None = None, streams: Sequence[Stream] = ()) -> dict[Topic, SchemaId]:
    """Return the id of each topic's schema: from the registry, or the fixed one if none is configured.

    The topics are those of `streams`, by default the captured ones, and that of the heartbeats. The latter's id is
    omitted if unavailable, since events do not depend on it. `stop` ends the wait.
    """
    streams = streams or config.capture.streams
    if config.registry.url is None:
        return {topic(config, feed): feed.fixed_schema_id for feed in (*streams, HEARTBEATS)}
    registry = SchemaIds(config.registry, config.state_dir / "schema_ids.json", stop=stop)
    return registry.find(schemas_by_topic(config, streams), optional=schemas_by_topic(config, [HEARTBEATS]))


def schemas_by_topic(config: Config, feeds: Sequence[Feed]) -> dict[Topic, AvroSchema]:
    """Return this version's schema of each feed's topic."""
    return {topic(config, feed): load_schema(feed.schema_file) for feed in feeds}
