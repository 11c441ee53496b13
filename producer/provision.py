"""What an administrator does once: the topics created, the schemas registered."""

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from producer.config import Config
from producer.encode import load_schema
from producer.errors import UnavailableError
from producer.events import STREAMS, Stream, Topic
from producer.registry import SchemaIds

_TIMEOUT_S = 10.0
_TOPIC_SETTINGS = {"cleanup.policy": "delete", "message.timestamp.type": "CreateTime"}


def topic(config: Config, stream: Stream) -> Topic:
    """Return the topic of a stream's events."""
    return Topic(config.kafka.topic_prefix + stream.topic)


def create_topics(config: Config, partitions: int, replication: int) -> list[str]:
    """Create the topics that do not exist; return a line about each. UnavailableError says what failed."""
    client = AdminClient({**config.kafka.settings, "bootstrap.servers": config.kafka.brokers or ""})
    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        stop=stop_after_attempt(3),
        reraise=True,
    )
    lines = []
    for stream in STREAMS:
        name = topic(config, stream)
        wanted = NewTopic(name, partitions, replication, config=_TOPIC_SETTINGS)
        try:
            made = retrying(_create, client, wanted)
        except KafkaException as error:
            raise UnavailableError(f"topic {name} cannot be created: {error.args[0].str()}") from error
        lines.append(f"topic {name}: {f'created, {partitions} partitions' if made else 'exists'}")
    return lines


def register_schemas(config: Config) -> list[str]:
    """Register the schemas where a registry is configured; return a line about each."""
    if config.registry.url is None:
        return ["no registry: schema ids are " + ", ".join(f"{topic(config, s)} {s.fixed_schema_id}" for s in STREAMS)]
    registry = SchemaIds(config.registry, cache=None)
    lines = []
    for stream in STREAMS:
        schema_id = registry.register(topic(config, stream), load_schema(stream))
        lines.append(f"schema {topic(config, stream)}-value: id {schema_id}")
    return lines


def _create(client: AdminClient, wanted: NewTopic) -> bool:
    """Create one topic; False where it exists."""
    try:
        client.create_topics([wanted], request_timeout=_TIMEOUT_S)[wanted.topic].result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise
    return True


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, KafkaException) and (
        error.args[0].retriable() or error.args[0].code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT)
    )
