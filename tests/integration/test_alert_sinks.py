"""Alerts in a real topic and a real Alertmanager, also while one is unavailable."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from producer.alert.model import Alert, Sink
from producer.alert.sinks import open_sinks
from producer.commands.init import register_schemas
from producer.config.load import Alert as AlertConfig
from producer.config.load import Config, Kafka, Registry
from producer.errors import SchemaError
from producer.events import ALERTS
from producer.schemas import load_schema
from tests.support.alerts import COUNT, LOSS
from tests.support.servers import alertmanager
from tests.support.servers.alertmanager import AlertmanagerServer
from tests.support.servers.consume import decode, kcat_messages
from tests.support.servers.kafka import KafkaServer

CHANGES = [LOSS, COUNT, replace(LOSS, firing=False)]
FIRES = {"alertname": "loss", "by": "host", "group": "web-1", "host": "web-1"}


class Stop(Exception):
    pass


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[AlertmanagerServer]:
    try:
        alertmanager.package()
    except LookupError as error:
        pytest.skip(f"NO REAL ALERTMANAGER: {error}")
    server = AlertmanagerServer(tmp_path / "alertmanager")
    yield server
    server.stop()


def alertmanager_sink(server: AlertmanagerServer, wait: Callable[[float], None]) -> Sink:
    config = Config(alert=AlertConfig(alertmanager=server.url))
    sink, topic = open_sinks(config, "127.0.0.1:1", wait)
    topic.close()
    return sink


def test_alertmanager_has_what_fires_and_not_what_is_resolved(manager: AlertmanagerServer) -> None:
    manager.start()
    sink = alertmanager_sink(manager, pytest.fail)
    sink.send([LOSS])
    (received,) = manager.alerts()
    assert received["labels"] == FIRES
    assert received["status"]["state"] in ("active", "unprocessed")

    sink.send([replace(LOSS, firing=False)])
    assert manager.alerts() == []


def test_alertmanager_gets_the_alerts_when_it_is_available_again(manager: AlertmanagerServer) -> None:
    waits: list[float] = []

    def start(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            manager.start()

    alertmanager_sink(manager, start).send([LOSS])
    assert len(waits) == 2
    assert [received["labels"] for received in manager.alerts()] == [FIRES]


def sink_of(bootstrap: str, prefix: str, wait: Callable[[float], None], registry: str | None = None) -> Sink:
    config = Config(kafka=Kafka(topic_prefix=prefix), registry=Registry(registry))
    (sink,) = open_sinks(config, bootstrap, wait)
    return sink


def alerts(bootstrap: str, topic: str) -> list[tuple[bytes | None, int, Alert]]:
    """Return key, schema id and alert of each message."""
    found = []
    for message in kcat_messages(bootstrap, topic):
        assert message.value is not None
        number, record = decode(message.value, load_schema(ALERTS.schema_file))
        del record["ts"], record["summary"]
        found.append((message.key, number, Alert(**record)))
    return found


@pytest.mark.real_kafka
def test_the_topic_has_each_change_in_order_with_the_registrys_id(kafka, registry, tmp_path) -> None:
    config = Config(state_dir=tmp_path, kafka=Kafka(topic_prefix="sinks."), registry=Registry(registry.url))
    with pytest.raises(SchemaError, match="run `rebpf init` with --alerts"):
        sink_of(kafka.bootstrap, "sinks.", pytest.fail, registry.url)
    lines = register_schemas(config, alerts=True)
    (number,) = (int(line.split()[3].strip(",")) for line in lines if line.startswith("schema sinks.tcp_alerts-value"))
    kafka.create_topic(f"sinks.{ALERTS.topic}", partitions=1)

    sink = sink_of(kafka.bootstrap, "sinks.", lambda seconds: None, registry.url)
    sink.send(CHANGES)
    assert alerts(kafka.bootstrap, f"sinks.{ALERTS.topic}") == [(each.key.encode(), number, each) for each in CHANGES]
    sink.close()


@pytest.mark.real_kafka
def test_the_topic_has_all_that_was_sent_while_the_broker_was_away(servers_present, tmp_path) -> None:
    waits: list[float] = []

    def start(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            server.start()

    def give_up(seconds: float) -> None:
        raise Stop

    with KafkaServer(tmp_path) as server:
        server.create_topic(ALERTS.topic, partitions=1)
        patient, hasty = (sink_of(server.bootstrap, "", wait) for wait in (start, give_up))
        server.kill()
        # An ended sink leaves no messages that would arrive later, though its client lives.
        with pytest.raises(Stop):
            hasty.send(CHANGES)
        patient.send(CHANGES)
        assert len(waits) >= 3
        hasty.send([])
        assert [alert for *_, alert in alerts(server.bootstrap, ALERTS.topic)] == CHANGES
        patient.close()
        hasty.close()
