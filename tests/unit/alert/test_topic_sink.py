"""Alerts to a topic whose brokers refuse them for a while."""

import logging
from collections.abc import Iterator
from contextlib import closing

import pytest
from confluent_kafka import KafkaError

from producer.alert import topic_sink
from producer.alert.record import AlertEncoder
from producer.alert.topic_sink import TopicSink
from producer.config.librdkafka import client_settings
from producer.events import ALERTS
from tests.support.alerts import COUNT, LOSS
from tests.support.mock_cluster import INIT_PRODUCER_ID, PRODUCE, Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.create("tcp_alerts")
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    ("request_kind", "error"),
    [
        (INIT_PRODUCER_ID, KafkaError.CLUSTER_AUTHORIZATION_FAILED),  # librdkafka's client fails for good
        (PRODUCE, KafkaError.TOPIC_AUTHORIZATION_FAILED),
    ],
)
def test_a_missing_right_is_named_until_it_is_granted(
    cluster: Cluster, request_kind: int, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.answer_with(request_kind, error)
    waits: list[float] = []
    sink = TopicSink(
        client_settings(cluster.brokers, {}), "tcp_alerts", AlertEncoder(ALERTS.fixed_schema_id), waits.append
    )
    with caplog.at_level(logging.WARNING):
        sink.send([LOSS, COUNT])
    sink.close()

    keys = [key for key, _ in cluster.read("tcp_alerts", 2)]
    assert keys == [b"loss/web-1", b"many/192.0.2.1"]
    lines = {record.getMessage().partition(": topic ")[2] for record in caplog.records if record.name.endswith("retry")}
    grant = "kafka-acls.sh --add --producer --topic tcp_alerts --allow-principal User:NAME"
    assert lines == {f"tcp_alerts: this user may not write to it: {grant}"}


def test_a_recreated_topic_gets_the_alerts_from_a_new_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first client waits for the former leader for good."""
    monkeypatch.setattr(topic_sink, "_SILENT_S", 1.0)
    with closing(Cluster(brokers=3)) as cluster:
        cluster.create("tcp_alerts")
        for broker in (1, 2, 1, 2, 1):
            cluster.lead("tcp_alerts", 0, broker)
        settings = client_settings(cluster.brokers, {})
        with closing(
            TopicSink(settings, "tcp_alerts", AlertEncoder(ALERTS.fixed_schema_id), lambda seconds: None)
        ) as sink:
            sink.send([LOSS])
            cluster.delete("tcp_alerts")
            cluster.create("tcp_alerts")
            cluster.lead("tcp_alerts", 0, 3)
            sink.send([COUNT])
            assert [key for key, _ in cluster.read("tcp_alerts", 1)] == [b"many/192.0.2.1"]
