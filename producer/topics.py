"""Topic names with the configured prefix."""

from producer.config.load import Config
from producer.events import HEARTBEATS, Stream, Topic

ALERTS = Topic("tcp_alerts")
ALERT_SUMS = Topic("tcp_alert_sums")


def topic(config: Config, stream: Stream) -> Topic:
    """Return the topic of a stream's events."""
    return Topic(config.kafka.topic_prefix + stream.topic)


def heartbeat_topic(config: Config) -> Topic:
    """Return the topic of the heartbeats."""
    return Topic(config.kafka.topic_prefix + HEARTBEATS.topic)


def alert_topics(config: Config) -> tuple[Topic, Topic]:
    """Return the topics of alerts and of sums, the latter internal to `rebpf alert`."""
    return Topic(config.kafka.topic_prefix + ALERTS), Topic(config.kafka.topic_prefix + ALERT_SUMS)
