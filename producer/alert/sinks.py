"""Where alerts go: standard output, Alertmanager, and the topic tcp_alerts."""

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict

from producer.alert.alertmanager import Alertmanager
from producer.alert.model import Alert, Sink
from producer.alert.record import AlertEncoder, summary
from producer.alert.retry import Wait, until_it_works
from producer.alert.writer import ANY_PARTITION, TopicWriter
from producer.config.librdkafka import client_settings
from producer.config.load import Config
from producer.errors import ConfigError, SchemaError
from producer.events import SchemaId, Topic
from producer.host.output import echo
from producer.host.signals import Flag
from producer.host.text import printable, to_json
from producer.registry.schema_ids import SchemaIds
from producer.schemas import ALERT_FILE, ALERT_ID, load_schema
from producer.topics import alert_topics


def open_sinks(
    config: Config, brokers: str, wait: Wait, *, as_json: bool = False, stop: Flag | None = None
) -> list[Sink]:
    """Return those that are configured; with `as_json` also standard output, in JSON lines. `stop` ends what waits.

    The topic is the last: who takes over goes on from what it says, so that the others must have been told before.
    Raises ConfigError where there is none.
    """
    sinks: list[Sink] = []
    if config.alert.stdout or as_json:
        sinks.append(StandardOutput(as_json=as_json))
    if config.alert.alertmanager is not None:
        sinks.append(Alertmanager(config.alert.alertmanager, config.alert.repeat_s, wait, stop))
    if config.alert.topic:
        topic, _ = alert_topics(config)
        settings = client_settings(brokers, config.kafka.settings)
        encoder = AlertEncoder(_schema_id(config, topic, stop))
        sinks.append(TopicSink(TopicWriter(settings, topic, wait), encoder, wait))
    if not sinks:
        raise ConfigError("alert: alerts go nowhere: set topic, stdout or alertmanager below [alert]")
    return sinks


def _schema_id(config: Config, topic: Topic, stop: Flag | None) -> SchemaId:
    if config.registry.url is None:
        return ALERT_ID
    with SchemaIds(config.registry, cache=None, stop=stop) as registry:
        try:
            return registry.find({topic: load_schema(ALERT_FILE)})[topic]
        except SchemaError as error:
            raise SchemaError(f"{error} with --alerts") from error


class StandardOutput:
    """Writes a line for each alert."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def send(self, alerts: Sequence[Alert]) -> None:
        """Write them."""
        for alert in alerts:
            text = f"{'FIRING' if alert.firing else 'RESOLVED'} {summary(alert)}"
            echo(to_json({**asdict(alert), "summary": summary(alert)}) if self._as_json else printable(text))

    def repeat(self, firing: Collection[Alert]) -> None:
        """Do nothing: what is written stays."""

    def close(self) -> None:
        """Do nothing."""


class TopicSink:
    """Writes to a topic by `writer`; `wait` is called between two tries."""

    def __init__(self, writer: TopicWriter, encoder: AlertEncoder, wait: Wait) -> None:
        self._writer = writer
        self._encoder = encoder
        self._wait = wait

    def send(self, alerts: Sequence[Alert]) -> None:
        """Return when Kafka has acknowledged all. Where it refuses one, all are sent again, so that order is kept."""
        until_it_works("alerts", self._wait)(self._put, [self._encoder.encode(alert, time.time()) for alert in alerts])

    def repeat(self, firing: Collection[Alert]) -> None:
        """Do nothing: the topic is compacted, and keeps what fires."""

    def close(self) -> None:
        """Give up what is under way."""
        self._writer.give_up()

    def _put(self, messages: Sequence[tuple[bytes, bytes]]) -> None:
        try:
            for key, value in messages:
                self._writer.put(ANY_PARTITION, value, key)
            self._writer.flush()
        except BaseException:
            # Who has the partitions now sends them, or the next try does; they must not come later from here.
            self._writer.give_up()
            raise
