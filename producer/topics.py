"""Topic names with the configured prefix."""

from producer.config.load import Config
from producer.events import HEARTBEATS, Stream, Topic

ALERTS = Topic("tcp_alerts")


def topic(config: Config, stream: Stream) -> Topic:
    """Return the topic of a stream's events."""
    return Topic(config.kafka.topic_prefix + stream.topic)


def heartbeat_topic(config: Config) -> Topic:
    """Return the topic of the heartbeats."""
    return Topic(config.kafka.topic_prefix + HEARTBEATS.topic)


def alert_topic(config: Config) -> Topic:
    """Return the topic of the alerts."""
    return Topic(config.kafka.topic_prefix + ALERTS)
