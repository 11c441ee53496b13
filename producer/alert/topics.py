"""The topics that `rebpf alert` uses."""

from collections.abc import Mapping
from dataclasses import dataclass

from producer.alert.evaluate import RETRANSMITS, TRANSMITS
from producer.config.load import Config
from producer.errors import ConfigError
from producer.events import RETRANSMITS as RETRANSMIT_STREAM
from producer.events import TRANSMITS as TRANSMIT_STREAM
from producer.topics import alert_topics, heartbeat_topic, topic


@dataclass(frozen=True, slots=True)
class Topics:
    """The names of the topics, by what they hold."""

    streams: Mapping[str, str]
    """The event topics that the rules need, with the stream's name in the sums."""
    sums: str
    heartbeats: str | None
    """None if silence detection is off."""
    alerts: str | None
    """Written, and read at the start; None if alerts do not go to a topic."""

    @property
    def read(self) -> list[str]:
        """The topics that the group subscribes to."""
        return [*self.streams, self.sums, *([self.heartbeats] if self.heartbeats else [])]


def topics_of(config: Config) -> Topics:
    """Return the topics that a configuration needs; ConfigError if it has nothing to alert on."""
    alert = config.alert
    if not alert.rules and not alert.missed_heartbeats:
        raise ConfigError("alert: nothing to alert on: add [[alert.rules]], or set missed_heartbeats above 0")
    streams = {}
    if alert.rules:
        streams[str(topic(config, RETRANSMIT_STREAM))] = RETRANSMITS
    if any(rule.measure == "ratio" for rule in alert.rules):
        streams[str(topic(config, TRANSMIT_STREAM))] = TRANSMITS
    alerts, sums = alert_topics(config)
    return Topics(
        streams, sums, heartbeat_topic(config) if alert.missed_heartbeats else None, alerts if alert.topic else None
    )
