"""What `rebpf alert` needs of its brokers: topics, and leaders, for which it waits."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from confluent_kafka import Consumer, TopicPartition

from producer.alert import reading
from producer.alert.model import Counts
from producer.alert.reading import Reading, StalledError, topics_of
from producer.config.alerts import AlertRule
from producer.config.load import Config
from producer.consume.decode import Decoder
from producer.errors import UnavailableError
from tests.support.flows import Flow, values
from tests.support.mock_cluster import LIST_OFFSETS, Cluster
from tests.support.rebpf import wait_until


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster with a topic, of whose two partitions the second has no leader."""
    cluster = Cluster()
    cluster.create("tcp_flow", 2)
    cluster.lead("tcp_flow", 1, -1)
    yield cluster
    cluster.close()


def put(cluster: Cluster, partition: int, age_ms: int = 0) -> None:
    at_ms = time.time_ns() // 1_000_000 - age_ms
    cluster.put("tcp_flow", values([Flow("web-1", 7, at_ms, at_ms - 1000, 10)])[0], partition, at_ms)


def opened(cluster: Cluster, counts: Counts) -> Reading:
    config = Config()
    config = replace(config, alert=replace(config.alert, rules=(AlertRule(name="loss"),), missed_heartbeats=0))
    decoder = Decoder(None)
    return Reading(config, cluster.brokers, topics_of(config), [], decoder, counts)


def test_a_member_of_many_partitions_starts_with_two_requests(cluster: Cluster) -> None:
    """Each request after the first fetch waits for the answer to one: partitions in turn would take a second each."""
    cluster.lead("tcp_flow", 1, 1)
    cluster.track()
    active = opened(cluster, Counts())
    try:
        active.start([TopicPartition("tcp_flow", number) for number in range(2)], from_beginning=False)
        assert cluster.requests(LIST_OFFSETS) == 2, "for the ends, and for the first records that are needed"
    finally:
        active.close()


@pytest.mark.slow
def test_a_member_starts_without_it_and_reads_it_once_it_has_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "_LIST_S", 0.0)
    counts = Counts()
    active = opened(cluster, counts)

    def has_read(count: int) -> bool:
        active.read(0.1)
        return counts.read == count

    def has_added() -> bool:
        active.decide()
        return len(list(active.positions())) == 2

    try:
        active.start([TopicPartition("tcp_flow", number) for number in range(2)], from_beginning=False)
        assert "waiting for leaders of partitions=tcp_flow/1" in caplog.text
        put(cluster, 0)
        wait_until("the record is read", lambda: has_read(1))
        cluster.lead("tcp_flow", 1, 1)
        wait_until("the partition is read", has_added)
        put(cluster, 1)
        wait_until("its record is read", lambda: has_read(2))
    finally:
        active.close()


def test_windows_of_a_backlog_are_decided_while_it_is_read_from_the_beginning() -> None:
    """Otherwise all of them stay open until its end, and what does not fit is not counted."""
    with closing(Cluster()) as cluster:
        cluster.create("tcp_flow")
        counts = Counts()
        with closing(opened(cluster, counts)) as active:
            active.start([TopicPartition("tcp_flow", 0)], from_beginning=True)
            put(cluster, 0, age_ms=7_200_000)

            def has_read() -> bool:
                active.read(0.1)
                return counts.read == 1

            wait_until("the record is read", has_read)
            active.decide()
            assert active.lag_s == pytest.approx(7200, abs=60)


@pytest.mark.slow
@pytest.mark.parametrize("more", [3, 9], ids=["fewer messages than before", "more"])
def test_a_recreated_topic_is_read_with_a_new_client(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leader epoch is lower, so librdkafka ignores that another broker leads (its issue 4898)."""
    monkeypatch.setattr(reading, "_STALL_STEPS", 10)
    with closing(Cluster(brokers=3)) as cluster:
        cluster.create("tcp_flow")
        for broker in (1, 2, 1, 2, 1):
            cluster.lead("tcp_flow", 0, broker)
        counts = Counts()

        def has_read(active: Reading, count: int) -> bool:
            active.read(0.1)
            active.decide()
            return counts.read == count

        with closing(opened(cluster, counts)) as active:
            active.start([TopicPartition("tcp_flow", 0)], from_beginning=False)
            for _ in range(5):
                put(cluster, 0)
            wait_until("they are read", lambda: has_read(active, 5))
            cluster.delete("tcp_flow")
            cluster.create("tcp_flow")
            cluster.lead("tcp_flow", 0, 3)
            for _ in range(more):
                put(cluster, 0)
            with pytest.raises(StalledError, match="partition=tcp_flow/0"):
                wait_until("it stands still", lambda: has_read(active, -1))
        with closing(opened(cluster, counts)) as active:
            active.start([TopicPartition("tcp_flow", 0)], from_beginning=False)
            put(cluster, 0)
            wait_until("the next one is read", lambda: has_read(active, 6))


def test_the_test_broker_is_no_place_for_alerts(cluster: Cluster) -> None:
    """Its topics cannot be created, so an advice to run `rebpf init` would lead nowhere."""
    client = Consumer({"bootstrap.servers": cluster.brokers, "group.id": "alert"}, logger=logging.getLogger("alert"))
    with pytest.raises(UnavailableError, match=r"topic rebpf_agent does not exist.*in-process test broker"):
        topics_of(Config()).require(client)
    client.close()
