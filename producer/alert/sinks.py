"""Where alerts go: standard output, Alertmanager, a webhook, and the topic tcp_alerts."""

from collections.abc import Sequence

from producer.alert.alertmanager import Alertmanager, Webhook
from producer.alert.model import Alert, Sink
from producer.alert.record import AlertEncoder, as_json_object, summary
from producer.alert.retry import Sleep
from producer.alert.topic_sink import TopicSink
from producer.config.librdkafka import client_settings
from producer.config.load import Config
from producer.errors import SchemaError
from producer.events import ALERTS, SchemaId, Topic
from producer.host.output import echo
from producer.host.signals import Flag
from producer.host.text import printable, to_json
from producer.registry.published import schemas_by_topic
from producer.registry.schema_ids import SchemaIds
from producer.topics import topic


def open_sinks(
    config: Config, brokers: str, sleep: Sleep, *, as_json: bool = False, stop: Flag | None = None
) -> list[Sink]:
    """Return the configured sinks; with `as_json` also standard output, in JSON lines. `stop` ends their waits.

    The topic is last: the next active member resumes from it, so the others must have been written before.
    """
    sinks: list[Sink] = []
    if config.alert.stdout or as_json:
        sinks.append(StandardOutput(as_json=as_json))
    if config.alert.alertmanager is not None:
        sinks.append(Alertmanager(config.alert.alertmanager, config.alert.repeat_s, sleep, stop))
    if config.alert.webhook is not None:
        sinks.append(Webhook(config.alert.webhook, sleep, stop))
    alerts = topic(config, ALERTS)
    encoder = AlertEncoder(_schema_id(config, alerts, stop))
    sinks.append(TopicSink(client_settings(brokers, config.kafka.settings), alerts, encoder, sleep))
    return sinks


def _schema_id(config: Config, alerts: Topic, stop: Flag | None) -> SchemaId:
    if config.registry.url is None:
        return ALERTS.fixed_schema_id
    registry = SchemaIds(config.registry, cache=None, stop=stop)
    try:
        return registry.find(schemas_by_topic(config, [ALERTS]))[alerts]
    except SchemaError as error:
        raise SchemaError(f"{error} with --alerts") from error


class StandardOutput(Sink):
    """Writes one line per alert."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def send(self, alerts: Sequence[Alert]) -> None:
        """Write the alerts."""
        for alert in alerts:
            text = f"{'FIRING' if alert.firing else 'RESOLVED'} {summary(alert)}"
            echo(to_json(as_json_object(alert)) if self._as_json else printable(text))
