"""The topics of the group that alerts."""

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
    """Which topics are read, and what is in them."""

    streams: Mapping[str, str]
    """Those of events that the rules need, each with its stream's name in the sums."""
    sums: str
    heartbeats: str | None
    """None where no silence is looked for."""
    alerts: str | None
    """Where alerts are put, and read at the start; None where they are not put into a topic."""

    @property
    def read(self) -> list[str]:
        """Those that the group shares."""
        return [*self.streams, self.sums, *([self.heartbeats] if self.heartbeats else [])]


def topics_of(config: Config) -> Topics:
    """Return the topics that a configuration needs; ConfigError where it has nothing to alert on."""
    alert = config.alert
    if not alert.rules and not alert.silent_after:
        raise ConfigError("alert: there is nothing to alert on: no [[alert.rules]], and silent_after is 0")
    streams = {}
    if alert.rules:
        streams[str(topic(config, RETRANSMIT_STREAM))] = RETRANSMITS
    if any(rule.measure == "ratio" for rule in alert.rules):
        streams[str(topic(config, TRANSMIT_STREAM))] = TRANSMITS
    alerts, sums = alert_topics(config)
    return Topics(
        streams, sums, heartbeat_topic(config) if alert.silent_after else None, alerts if alert.topic else None
    )
