"""Following topics of which a partition has no leader for a while."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from confluent_kafka import KafkaError

from producer.consume import follow
from producer.consume.follow import Follower, Start
from producer.consume.reader import TopicReader
from producer.errors import PermissionDenied, UnavailableError
from tests.support.mock_cluster import FETCH, FIND_COORDINATOR, LIST_OFFSETS, Cluster
from tests.support.rebpf import wait_until

ASKS_S = 2.0
"""Within this time a client looks for its group's coordinator."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster with a topic, of whose two partitions the second has no leader."""
    cluster = Cluster()
    cluster.create("t", 2)
    cluster.lead("t", 1, -1)
    yield cluster
    cluster.close()


@pytest.mark.slow
def test_others_are_followed_meanwhile_and_it_is_once_it_has_a_leader(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follow, "_LOOK_S", 0.0)
    cluster.put("t", b"before", 0)
    follower = Follower(cluster.brokers, "test", ["t"], {}, start=Start.END)
    try:
        follower.start()
        assert "waiting for leaders of partitions=t/1" in caplog.text
        cluster.put("t", b"first", 0)
        assert [each.value() for each in wait_until("the first message", follower.poll)] == [b"first"]
        cluster.lead("t", 1, 1)
        cluster.put("t", b"second", 1)
        assert [each.value() for each in wait_until("the second message", follower.poll)] == [b"second"]
    finally:
        follower.close()


@pytest.mark.slow
def test_a_recreated_topic_is_read_from_its_beginning_with_a_new_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its leader epoch is lower, so librdkafka ignores that another broker leads (its issue 4898)."""
    monkeypatch.setattr(follow, "_LOOK_S", 1.0)
    monkeypatch.setattr(follow, "_STILL_S", 2.0)
    with closing(Cluster(brokers=3)) as cluster:
        for topic in ("t", "u"):
            cluster.create(topic)
        for broker in (1, 2, 1, 2, 1):
            cluster.lead("t", 0, broker)
        for topic, value in (("t", b"old"), ("t", b"old"), ("t", b"old"), ("u", b"once")):
            cluster.put(topic, value, 0)
        found: list[bytes] = []

        def has_read(count: int) -> bool:
            found.extend(each.value() or b"" for each in follower.poll())
            return len(found) >= count

        with closing(Follower(cluster.brokers, "test", ["t", "u"], {}, start=Start.BEGINNING)) as follower:
            follower.start()
            wait_until("all messages", lambda: has_read(4))
            cluster.delete("t")
            cluster.create("t")
            cluster.lead("t", 0, 3)
            for value in (b"new", b"newer"):
                cluster.put("t", value, 0)
            wait_until("the new messages", lambda: has_read(6))
            cluster.put("t", b"next", 0)
            cluster.put("u", b"again", 0)
            wait_until("the next ones", lambda: has_read(8))
    assert sorted(found[:4]) == [b"old", b"old", b"old", b"once"]
    assert found[4:6] == [b"new", b"newer"]
    assert sorted(found[6:]) == [b"again", b"next"]
    assert "is stuck at partitions=t/0" in caplog.text


def test_many_partitions_take_one_request(cluster: Cluster) -> None:
    """Each request after the first fetch waits for the answer to one: partitions in turn would take a second each."""
    cluster.create("u", 20)
    cluster.lead("t", 1, 1)
    cluster.put("u", b"before", 7)
    cluster.track()
    follower = Follower(cluster.brokers, "test", ["t", "u"], {}, start=Start.END)
    try:
        follower.start()
        assert cluster.requests(LIST_OFFSETS) == 1
        cluster.put("u", b"after", 7)
        assert [each.value() for each in wait_until("the message", follower.poll)] == [b"after"]
    finally:
        follower.close()


def test_the_spans_of_many_partitions_take_two_requests(cluster: Cluster) -> None:
    cluster.create("u", 20)
    cluster.put("u", b"value", 7)
    cluster.track()
    reader = TopicReader(cluster.brokers, ["u"], {})
    assert cluster.requests(LIST_OFFSETS) == 2
    assert reader.spans == {("u", number): (0, int(number == 7)) for number in range(20)}
    reader.close()


@pytest.fixture
def without_groups(cluster: Cluster) -> Cluster:
    """A cluster whose users have no rights for groups, and a message."""
    cluster.lead("t", 1, 1)
    cluster.answer_with(FIND_COORDINATOR, *[KafkaError.GROUP_AUTHORIZATION_FAILED] * 1000)
    cluster.put("t", b"value", 0)
    return cluster


@pytest.mark.slow
def test_no_rights_for_groups_are_needed_to_follow(without_groups: Cluster) -> None:
    follower = Follower(without_groups.brokers, "test", ["t"], {}, start=Start.BEGINNING)
    try:
        follower.start()
        end = time.monotonic() + ASKS_S
        found = []
        while time.monotonic() < end or not found:
            found += follower.poll()
        assert [each.value() for each in found] == [b"value"]
    finally:
        follower.close()


def test_no_rights_for_groups_are_needed_to_read(without_groups: Cluster) -> None:
    reader = TopicReader(without_groups.brokers, ["t"], {})
    read = [each for batch in reader.batches() for messages in batch.values() for each in messages]
    reader.close()
    assert [each.value() for each in read] == [b"value"]


def test_a_topic_that_this_user_may_not_read_is_named_with_the_fix(cluster: Cluster) -> None:
    cluster.lead("t", 1, 1)
    cluster.put("t", b"value", 0)
    cluster.answer_with(FETCH, *[KafkaError.TOPIC_AUTHORIZATION_FAILED] * 1000)
    follower = Follower(cluster.brokers, "test", ["t"], {}, start=Start.BEGINNING)
    try:
        follower.start()
        with pytest.raises(PermissionDenied, match=r"^topic t: this user may not read it: kafka-acls.sh --add "):
            wait_until("the error", follower.poll)
    finally:
        follower.close()


def test_a_reader_that_must_have_all_names_what_is_missing(cluster: Cluster) -> None:
    with pytest.raises(UnavailableError, match=r"^topic t: no leader of partitions 1: start their brokers$"):
        TopicReader(cluster.brokers, ["t"], {})
