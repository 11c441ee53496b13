"""Faults between the producer and Kafka: every loss has a reason, and the log names the fault.

Each test makes one fault, under traffic that a packet socket captures beside the producer, and ends it. A registry that
does not answer: test_registry.py. Two producers on one host, and signals: test_lifecycle.py. A producer that crashes:
test_crash.py.
"""

import ast
import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.host.cgroups import cgroup2_root
from tests.support import topics
from tests.support.faults import (
    PARTITIONS,
    Scene,
    assert_other_port_too,
    assert_same,
    create_topics,
    once,
    retransmitted_syn,
    rss_anon_kb,
    scene,
)
from tests.support.rebpf import repeating, wait_until
from tests.support.servers.cluster import KafkaCluster
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import free_port
from tests.support.topics import TRANSMIT
from tests.support.traffic import exchange

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

ROOT = Path(__file__).parents[2]
# How long the client waits for a missing topic to appear; by default 30 s.
IMPATIENT = {"topic.metadata.propagation.max.ms": 2000}


@pytest.fixture(scope="module")
def broker(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    # Quotas over 2 s instead of 11, so that the broker's delays are shorter.
    short = {"quota.window.num": "2"}
    with KafkaServer(tmp_path_factory.mktemp("faults"), num_partitions=PARTITIONS, settings=short) as server:
        yield server


@pytest.fixture
def kafka(broker: KafkaServer) -> Iterator[KafkaServer]:
    """A broker for this module, restarted after each test."""
    yield broker
    repair(broker)


@pytest.fixture(scope="module")
def three(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with KafkaCluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture
def cluster(three: KafkaCluster) -> Iterator[KafkaCluster]:
    """Three brokers, restarted after each test."""
    yield three
    for node in three.nodes.values():
        repair(node)


def repair(server: KafkaServer) -> None:
    if server.is_running:
        server.resume()
    else:
        server.start()


def wait_until_in_sync(cluster: KafkaCluster, topic: str) -> None:
    everywhere = set(cluster.nodes)
    wait_until("all nodes are in sync", lambda: all(each == everywhere for each in cluster.in_sync(topic).values()))


def test_broker_down_at_start(kafka, tmp_path):
    create_topics(kafka, "late.")
    kafka.kill()
    with scene(tmp_path, kafka.bootstrap, "late.") as at:
        at.exchange()
        at.run.wait_for("WARNING kafka: .*Connection refused")
        at.wait_for_reason("late.tcp_transmit: events wait on disk")
        kafka.start()
        at.exchange()
        at.finish()

    at.assert_nothing_is_missing()


def test_broker_killed_and_restarted_mid_stream(kafka, tmp_path):
    create_topics(kafka, "killed.")
    with scene(tmp_path, kafka.bootstrap, "killed.") as at:
        with at.steady_traffic():
            topics.wait_for_events(kafka.bootstrap, "killed.tcp_transmit")
            kafka.kill()
            at.run.wait_for("WARNING kafka: .*Connection refused")
            at.wait_for_more()
            kafka.start()
            at.wait_for_more()
        at.finish()

    at.assert_nothing_is_missing()


def test_broker_frozen_and_memory_stays_flat_under_much_traffic(kafka, tmp_path):
    """More events than may be in flight (32,768), so the rest must be in the ring or the spool."""
    create_topics(kafka, "frozen.")
    patience = {"socket.timeout.ms": 2000, "request.timeout.ms": 1000}
    with scene(tmp_path, kafka.bootstrap, "frozen.", settings=patience) as at:
        at.exchange()
        at.wait_for_delivery()
        kafka.pause()
        while in_flight(at) < 30_000:
            make_segments(at, len(at.segments) + 5_000)
        full_kb = rss_anon_kb(at.run.pid)
        make_segments(at, len(at.segments) + 75_000)
        at.run.wait_for("WARNING .*Timed out .* in-flight")
        at.run.wait_for("WARNING kafka: .*brokers are down")
        at.wait_for_reason("frozen.tcp_transmit: events wait on disk")
        # They are 15 MB before anything is made of them. What was freed is returned every 5 s.
        wait_until("75,000 events take no memory", lambda: rss_anon_kb(at.run.pid) - full_kb < 8 << 10)
        kafka.resume()
        at.exchange()
        at.finish()

    at.assert_nothing_is_missing()


def in_flight(at: Scene) -> int:
    return sum(stream["in_flight"] for stream in at.run.get("status")["streams"])


def make_segments(at: Scene, count: int) -> None:
    while len(at.segments) < count:
        exchange(at.port, 50, rounds=100)


def test_leader_change_and_loss_of_one_of_three_brokers(cluster, tmp_path):
    create_topics(cluster, "leader.")
    with scene(tmp_path, cluster.bootstrap, "leader.") as at:
        with at.steady_traffic():
            at.wait_for_more()
            cluster.nodes[3].stop()  # as for an upgrade: it hands over its partitions
            cluster.nodes[3].start()
            wait_until_in_sync(cluster, "leader.tcp_transmit")
            at.wait_for_more()
            cluster.nodes[2].kill()
            wait_until("others lead", lambda: 2 not in cluster.leaders("leader.tcp_transmit").values())
            at.wait_for_more()
            at.wait_for_delivery()
            cluster.nodes[2].start()
            wait_until_in_sync(cluster, "leader.tcp_transmit")
            at.wait_for_more()
        at.finish()

    at.assert_nothing_is_missing()


def test_loss_of_two_of_three_brokers_if_each_event_has_to_be_on_two(cluster, tmp_path):
    create_topics(cluster, "alone.")
    with scene(tmp_path, cluster.bootstrap, "alone.") as at:
        at.exchange()
        at.wait_for_delivery()
        before = at.events()
        for node in cluster.brokers:
            node.kill()
        wait_until("one is left", lambda: set(map(len, cluster.in_sync("alone.tcp_transmit").values())) == {1})
        at.exchange()
        at.wait_for_reason("alone.tcp_transmit: events wait on disk")  # the client does not report the reason
        during = at.events()
        for node in cluster.brokers:
            node.start()
        at.exchange()
        at.finish()
    wait_until_in_sync(cluster, "alone.tcp_transmit")

    # Fewer may be visible: only the leader knew which were on two brokers.
    assert once(during).keys() <= once(before).keys(), "nothing is shown that is on one broker"
    at.assert_nothing_is_missing()


def test_a_missing_topic_does_not_affect_the_others(kafka, tmp_path):
    create_topics(kafka, "missing.", TRANSMIT)
    port = free_port()
    with scene(tmp_path, kafka.bootstrap, "missing.", settings=IMPATIENT, ports=(port,)) as at:
        at.exchange()
        retransmitted_syn(port)
        topics.wait_for_events(kafka.bootstrap, "missing.tcp_retransmit")
        at.run.wait_for("WARNING kafka: .*missing.tcp_transmit.*UNKNOWN_TOPIC")
        at.wait_for_reason("missing.tcp_transmit: kafka: .*UNKNOWN_TOPIC")
        kafka.create_topic("missing.tcp_transmit")
        at.finish()

    assert_other_port_too(at, port)


@pytest.mark.parametrize("partitions", [1, PARTITIONS, 2 * PARTITIONS])
def test_topic_deleted_while_running_and_created_again(kafka, tmp_path, partitions):
    create_topics(kafka, "deleted.")
    with scene(tmp_path, kafka.bootstrap, "deleted.", settings=IMPATIENT) as at:
        at.exchange()
        at.wait_for_delivery()
        before = at.events()
        kafka.delete_topic("deleted.tcp_transmit")
        at.exchange()
        at.run.wait_for("WARNING kafka: .*deleted.tcp_transmit.*UNKNOWN_TOPIC")
        kafka.create_topic("deleted.tcp_transmit", partitions)
        at.exchange()
        wait_until("the topic has the rest", lambda: len(once([*before, *at.events()])) >= len(at.segments))
        at.balance = at.run.finish()

    at.assert_nothing_is_missing(tuple(before))
    for name in ("tcp_transmit", "tcp_retransmit", "tcp_flow", "rebpf_agent"):
        kafka.delete_topic(f"deleted.{name}")


@pytest.fixture
def long_cgroup() -> Iterator[Path]:
    """A cgroup whose path makes an event of its processes larger than 1,200 bytes, even when compressed."""
    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    folders = [root / f"rebpf-test-{os.getpid()}"]
    for _ in range(8):
        folders.append(folders[-1] / secrets.token_urlsafe(180))
    with contextlib.ExitStack() as made:
        for folder in folders:
            folder.mkdir()
            made.callback(folder.rmdir)
        yield folders[-1]


def exchange_in(cgroup: Path, port: int) -> set[tuple[str, int]]:
    """Exchange data with an Echo from a process in a cgroup, which its events name; return its addresses."""
    program = (
        "import os, pathlib, sys\n"
        "from tests.support.traffic import exchange\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "print([each[:2] for each in exchange(int(sys.argv[2]), 3)[::2]])\n"
    )
    command = [sys.executable, "-c", program, cgroup, str(port)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=60)
    return set(ast.literal_eval(done.stdout.decode()))


def make_some_too_large(at: Scene, cgroup: Path) -> set[tuple[str, int]]:
    """Make both kinds of traffic in parallel; return the addresses of the large events."""
    with at.steady_traffic():
        at.wait_for_more(101)
        large = exchange_in(cgroup, at.port)
        at.wait_for_more(101)
    at.wait_for_rest()
    at.balance = at.run.finish()
    return large


def assert_these_alone_are_lost(at: Scene, large: set[tuple[str, int]]) -> None:
    """Check that all events are in the topic except those from the addresses, which are counted as lost.

    On a busy machine, the first events of a cgroup may come before its path is known: then they are small.
    """
    events = list(once(at.events()).values())
    unnamed = [each for each in events if each.record["cgroup"] is None]
    small = [each for each in at.segments if (each.saddr, each.sport) not in large]
    small += [each for each in map(topics.segment, unnamed) if (each.saddr, each.sport) in large]
    assert len(small) < len(at.segments)
    assert_same(small, events)
    at.assert_balance(delivered=len(small), lost={"MSG_SIZE_TOO_LARGE": len(at.segments) - len(small)})


def test_too_large_for_the_broker_among_good_ones(kafka, long_cgroup, tmp_path):
    """The topic's limit is above each good message, but below their batches."""
    create_topics(kafka, "large.", TRANSMIT)
    kafka.create_topic("large.tcp_transmit", settings={"max.message.bytes": "1000"})
    with scene(tmp_path, kafka.bootstrap, "large.") as at:
        large = make_some_too_large(at, long_cgroup)

    assert "messages one by one topic=large.tcp_transmit error=MSG_SIZE_TOO_LARGE" in at.run.log
    assert_these_alone_are_lost(at, large)


def test_too_large_for_the_client_among_good_ones(kafka, long_cgroup, tmp_path):
    create_topics(kafka, "limited.")
    with scene(tmp_path, kafka.bootstrap, "limited.", settings={"message.max.bytes": 1000}) as at:
        large = make_some_too_large(at, long_cgroup)

    assert_these_alone_are_lost(at, large)


def test_a_clock_that_the_broker_rejects_costs_no_event(kafka, tmp_path):
    """The topic rejects messages older than a millisecond until its setting is changed, as if the clock were behind."""
    create_topics(kafka, "refused.")
    limit = "message.timestamp.before.max.ms"
    kafka.set_topic("refused.tcp_transmit", {limit: "1"})
    with scene(tmp_path, kafka.bootstrap, "refused.") as at:
        at.exchange()
        at.wait_for_reason("refused.tcp_transmit: kafka: INVALID_TIMESTAMP")
        kafka.set_topic("refused.tcp_transmit", {limit: "3600000"})
        at.finish()

    at.assert_nothing_is_missing()


def test_slow_broker(kafka, tmp_path):
    """The broker delays its answers, so the client falls behind, and catches up when the quota ends."""
    create_topics(kafka, "slow.")
    with scene(tmp_path, kafka.bootstrap, "slow.", settings={"client.id": "slowed"}) as at:
        with kafka.slow("slowed", 50_000), repeating(lambda: exchange(at.port, 50, rounds=100), 0):
            at.wait_for_reason("slow.tcp_transmit: events wait on disk")
        at.finish()

    at.assert_nothing_is_missing()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with a state folder on a disk of 1 MiB."""
    state = tmp_path / "run" / "state"
    state.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", state], check=True)
    try:
        yield state.parent
    finally:
        subprocess.run(["umount", state], check=True)


def test_disk_full(kafka, small_disk):
    """The ring holds what the disk does not."""
    create_topics(kafka, "full.")
    with scene(small_disk, kafka.bootstrap, "full.") as at:
        at.exchange()
        at.wait_for_delivery()
        kafka.kill()
        make_segments(at, 60_000)
        at.wait_for_reason("full.tcp_transmit: spool: No space left on device")
        kafka.start()
        at.exchange()
        at.finish()

    at.assert_nothing_is_missing()
    assert [*small_disk.glob("state/spool/transmit/*")] == [], "the disk is free again"
