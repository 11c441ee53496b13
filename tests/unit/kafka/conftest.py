"""A mock cluster, and sinks of it."""

from collections.abc import Callable, Iterator, Mapping

import pytest

from producer.config.librdkafka import client_settings
from producer.events import Topic
from producer.kafka.sink import KafkaSink
from tests.support.mock_cluster import Cluster
from tests.support.sink import SETTINGS, TOPICS


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def open_sink(cluster: Cluster) -> Iterator[Callable[..., KafkaSink]]:
    sinks = []

    def make(
        settings: Mapping[str, str] | None = None,
        raw: Mapping[str, str] | None = None,
        topics: Mapping[str, Topic] = TOPICS,
        **arguments: object,
    ) -> KafkaSink:
        known = client_settings(cluster.brokers, {**SETTINGS, **(settings or {})}) | (raw or {})
        sink = KafkaSink(known, topics, **arguments)
        assert sink.open() == cluster.brokers
        sinks.append(sink)
        return sink

    yield make
    for sink in sinks:
        sink.close()
