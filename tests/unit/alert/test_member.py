"""A member of the consumer group, on a mock cluster."""

import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from producer.alert import member, reading
from producer.alert.member import Member
from producer.config.alerts import AlertRule
from producer.config.load import Config, Kafka, read_secret
from producer.errors import UnavailableError
from tests.support.mock_cluster import JOIN_GROUP, OFFSET_COMMIT, Cluster
from tests.support.rebpf import DEADLINE_S, wait_until


class Rights:
    """In place of the admin client, which the mock cluster does not answer."""

    def __init__(self, config: Config) -> None: ...

    def require_write(self, name: str) -> None: ...


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(member, "Admin", Rights)
    cluster = Cluster()
    for topic in ("tcp_flow", "tcp_alerts"):
        cluster.create(topic)
    yield cluster
    cluster.close()


def opened(cluster: Cluster, settings: Mapping[str, str], stop: threading.Event) -> Member:
    config = Config(kafka=Kafka(brokers=cluster.brokers, settings=settings))
    config = replace(config, alert=replace(config.alert, rules=(AlertRule(name="loss"),), missed_heartbeats=0))
    return Member(config, cluster.brokers, lambda wait: [], stop, from_beginning=False)


@contextmanager
def running(cluster: Cluster, settings: Mapping[str, str]) -> Iterator[None]:
    """Run a member in a thread; at the end, stop it, and check that it ends."""
    stop = threading.Event()
    thread = threading.Thread(target=opened(cluster, settings, stop).run, args=(None,), daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.mark.slow
def test_a_group_of_another_program_is_named(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """librdkafka tries to join forever, so this member would silently be a standby."""
    cluster.answer_with(JOIN_GROUP, *[KafkaError.INCONSISTENT_GROUP_PROTOCOL] * 100)
    named = r"group rebpf-alert: .* error=INCONSISTENT_GROUP_PROTOCOL \(another program has this group"
    with running(cluster, {}):
        wait_until("its name in the log", lambda: re.search(named, caplog.text))


@pytest.mark.slow
def test_a_broker_that_hangs_does_not_block_a_stop(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_ANSWER_S", 1.0)
    cluster.track()
    with running(cluster, {"socket.timeout.ms": "300000", "session.timeout.ms": "300000"}):
        wait_until("it is active and commits", lambda: cluster.requests(OFFSET_COMMIT) > 1)
        cluster.slow_down(300_000)
        before = cluster.requests(OFFSET_COMMIT)
        wait_until("a commit that is not answered", lambda: cluster.requests(OFFSET_COMMIT) > before)
    cluster.down()
    cluster.slow_down(0)
    cluster.up()
    wait_until("its client is closed", lambda: "kafka-close" not in [each.name for each in threading.enumerate()])


@pytest.mark.slow
def test_a_member_whose_secret_was_renewed_exits_to_be_restarted(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("first")
    cluster.track()
    alerting = opened(cluster, {"sasl.password": read_secret(path, "")}, threading.Event())
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(alerting.run, None)
        wait_until("it commits", lambda: cluster.requests(OFFSET_COMMIT))
        path.write_text("second")
        cluster.down()
        with pytest.raises(UnavailableError, match=r"certificates or secrets .* were renewed: start again"):
            ended.result(DEADLINE_S)
