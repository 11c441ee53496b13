"""Following topics of which a partition has no leader for a while."""

import logging
from collections.abc import Iterator

import pytest
from confluent_kafka import Producer

from producer.consume import follow
from producer.consume.follow import Follower, Start
from producer.consume.reader import TopicReader
from producer.errors import UnavailableError
from tests.support.mock_cluster import Cluster
from tests.support.rebpf import wait_until


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster with a topic, of whose two partitions the second has no leader."""
    cluster = Cluster()
    cluster.create("t", 2)
    cluster.lead("t", 1, -1)
    yield cluster
    cluster.close()


def put(cluster: Cluster, value: bytes, partition: int) -> None:
    client = Producer({"bootstrap.servers": cluster.brokers}, logger=logging.getLogger("put"))
    client.list_topics("t", timeout=10)
    client.produce("t", value, partition=partition)
    assert client.flush(10) == 0
    client.close()


def test_others_are_followed_meanwhile_and_it_is_once_it_has_a_leader(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follow, "_LOOK_S", 0.0)
    put(cluster, b"before", 0)
    follower = Follower(cluster.brokers, "test", ["t"], {}, start=Start.END)
    try:
        follower.start()
        assert "waiting for leaders of partitions=t/1" in caplog.text
        put(cluster, b"first", 0)
        assert [each.value() for each in wait_until("the first message", follower.poll)] == [b"first"]
        cluster.lead("t", 1, 1)
        put(cluster, b"second", 1)
        assert [each.value() for each in wait_until("the second message", follower.poll)] == [b"second"]
    finally:
        follower.close()


def test_a_reader_that_must_have_all_names_what_is_missing(cluster: Cluster) -> None:
    with pytest.raises(UnavailableError, match=r"^topic t: no leader of partitions 1: start their brokers$"):
        TopicReader(cluster.brokers, ["t"], {}, None)
