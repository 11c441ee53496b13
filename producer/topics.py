"""Topic names with the configured prefix."""

from producer.config.load import Config
from producer.events import Feed, Topic


def topic(config: Config, feed: Feed) -> Topic:
    """Return the topic of a feed's messages."""
    return Topic(config.kafka.topic_prefix + feed.topic)
