"""What can go wrong between the producer and Kafka: nothing is lost without a name, and the log says what is wrong.

Each test makes one fault, under traffic that a packet socket captures beside the producer, and ends it. A registry that
does not answer: test_registry.py. Two producers on one host, and signals: test_lifecycle.py. A producer that crashes:
test_crash.py.
"""

import ast
import contextlib
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.rungs import cgroup2_root
from tests.kafka import topics
from tests.kafka.faults import Scene, assert_accounted, assert_same, once, rss_anon_kb, scene
from tests.kafka.rebpf import wait_until
from tests.kafka.topics import RETRANSMIT, TRANSMIT
from tests.kafka.traffic import exchange
from tests.servers.certificates import Authority
from tests.servers.cluster import KafkaCluster
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port
from tests.servers.secure import PASSWORD, PLAIN, SCRAM, USERS, SecureKafka

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

ROOT = Path(__file__).parents[2]
AGENT = "rebpf_agent"
PARTITIONS = 5
# How long the client takes a new topic's absence for a delay; its default is 30 s.
IMPATIENT = {"topic.metadata.propagation.max.ms": 2000}


@pytest.fixture(scope="module")
def broker(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    # A quota counts over 2 s, and not over 11: the broker lets a client that is above it wait for so much less.
    short = {"quota.window.num": "2"}
    with KafkaServer(tmp_path_factory.mktemp("faults"), num_partitions=PARTITIONS, settings=short) as server:
        yield server


@pytest.fixture
def kafka(broker: KafkaServer) -> Iterator[KafkaServer]:
    """A broker of this module's own, that runs again after a test."""
    yield broker
    mend(broker)


@pytest.fixture(scope="module")
def secure(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    with SecureKafka(tmp_path_factory.mktemp("secure"), num_partitions=PARTITIONS) as server:
        yield server


@pytest.fixture(scope="module")
def three(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with KafkaCluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture
def cluster(three: KafkaCluster) -> Iterator[KafkaCluster]:
    """Three brokers, that run again after a test."""
    yield three
    for node in three.nodes.values():
        mend(node)


def mend(server: KafkaServer) -> None:
    if server.is_running:
        server.resume()
    else:
        server.start()


def wait_until_in_sync(cluster: KafkaCluster, topic: str) -> None:
    everywhere = set(cluster.nodes)
    wait_until("all nodes are in sync", lambda: all(each == everywhere for each in cluster.in_sync(topic).values()))


def create_topics(kafka: KafkaServer | KafkaCluster, prefix: str, *but: str) -> None:
    for topic in (TRANSMIT, RETRANSMIT, AGENT):
        if topic not in but:
            kafka.create_topic(prefix + topic)


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
    """More events are made than may be under way at a time (32,768), so that only the ring or the spool has room."""
    create_topics(kafka, "frozen.")
    patience = {"socket.timeout.ms": 2000, "request.timeout.ms": 1000}
    with scene(tmp_path, kafka.bootstrap, "frozen.", settings=patience) as at:
        at.exchange()
        at.wait_for_delivery()
        kafka.pause()
        make_segments(at, 45_000)
        full_kb = rss_anon_kb(at.run.pid)
        make_segments(at, 120_000)
        grown_kb = rss_anon_kb(at.run.pid) - full_kb
        at.run.wait_for("WARNING .*Timed out .* in-flight")
        at.run.wait_for("WARNING kafka: .*brokers are down")
        at.wait_for_reason("frozen.tcp_transmit: events wait on disk")
        kafka.resume()
        at.exchange()
        at.finish()

    assert grown_kb < 8 << 10, "75,000 events are 15 MB before anything is made of them"
    at.assert_nothing_is_missing()


def make_segments(at: Scene, count: int) -> None:
    while len(at.segments) < count:
        exchange(at.port, 50, rounds=100)


def test_leader_change_and_loss_of_one_of_three_brokers(cluster, tmp_path):
    create_topics(cluster, "leader.")
    with scene(tmp_path, cluster.bootstrap, "leader.") as at:
        with at.steady_traffic():
            at.wait_for_more()
            cluster.nodes[3].stop()  # as for an upgrade: it hands over what it leads
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
    assert re.search("WARNING kafka: .*Connection refused", at.run.log)


def test_loss_of_two_of_three_brokers_where_each_event_has_to_be_on_two(cluster, tmp_path):
    create_topics(cluster, "alone.")
    with scene(tmp_path, cluster.bootstrap, "alone.") as at:
        at.exchange()
        at.wait_for_delivery()
        before = at.events()
        for node in cluster.brokers:
            node.kill()
        wait_until("one is left", lambda: set(map(len, cluster.in_sync("alone.tcp_transmit").values())) == {1})
        at.exchange()
        for node in cluster.brokers:
            at.run.wait_for(f"{node.bootstrap}.*Connection refused")
        at.wait_for_reason("alone.tcp_transmit: events wait on disk")  # the client keeps to itself why
        during = at.events()
        for node in cluster.brokers:
            node.start()
        at.exchange()
        at.finish()
    wait_until_in_sync(cluster, "alone.tcp_transmit")

    # Fewer may be shown: what only the leader knew to be on two brokers.
    assert once(during).keys() <= once(before).keys(), "nothing is shown that is on one broker"
    at.assert_nothing_is_missing()


def retransmitted_syn(port: int) -> None:
    """Connect to a listener whose queue is full, and give up after the kernel has sent a SYN again."""
    with socket.create_server(("127.0.0.1", port), backlog=0), contextlib.ExitStack() as clients:
        for _ in range(8):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        wait_until("a SYN is sent again", lambda: syn_retransmits(client))


def syn_retransmits(client: socket.socket) -> int:
    """Return tcpi_total_retrans of struct tcp_info."""
    return struct.unpack_from("<I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]


def test_topic_missing_hurts_no_other(kafka, tmp_path):
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


def assert_other_port_too(at: Scene, port: int) -> None:
    """Check a run with two ports, of which one was not captured by others and had retransmitted SYNs."""
    events, syns = once(at.events()), once(at.events(RETRANSMIT))
    of_echo = [each for each in events.values() if at.port in (each.record["sport"], each.record["dport"])]
    assert_same(at.segments, of_echo)
    assert {event.record["dport"] for event in syns.values()} == {port}
    for topic, found in ((TRANSMIT, events), (RETRANSMIT, syns)):
        account = at.balance[at.prefix + topic]
        assert_accounted(account)
        assert account["lost"] == {}
        assert account["passed"] == account["delivered"] == len(found)


def test_topic_deleted_while_running_and_created_again(kafka, tmp_path):
    create_topics(kafka, "deleted.")
    with scene(tmp_path, kafka.bootstrap, "deleted.", settings=IMPATIENT) as at:
        at.exchange()
        at.wait_for_delivery()
        before = at.events()
        kafka.delete_topic("deleted.tcp_transmit")
        at.exchange()
        at.run.wait_for("WARNING kafka: .*deleted.tcp_transmit.*UNKNOWN_TOPIC")
        kafka.create_topic("deleted.tcp_transmit")
        at.exchange()
        wait_until("the topic has the rest", lambda: len(once([*before, *at.events()])) >= len(at.segments))
        at.balance = at.run.finish()

    at.assert_nothing_is_missing(tuple(before))


@pytest.fixture
def long_cgroup() -> Iterator[Path]:
    """A cgroup whose path makes an event of its processes larger than 1,200 bytes, even when compressed."""
    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    folders = [root / f"rebpf-test-{os.getpid()}"]
    for _ in range(5):
        folders.append(folders[-1] / secrets.token_hex(120))
    with contextlib.ExitStack() as made:
        for folder in folders:
            folder.mkdir()
            made.callback(folder.rmdir)
        yield folders[-1]


def exchange_in(cgroup: Path, port: int) -> set[tuple[str, int]]:
    """Exchange data with an Echo from a process in a cgroup, which its events tell; return its addresses."""
    program = (
        "import os, pathlib, sys\n"
        "from tests.kafka.traffic import exchange\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "print([each[:2] for each in exchange(int(sys.argv[2]), 3)[::2]])\n"
    )
    command = [sys.executable, "-c", program, cgroup, str(port)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=60)
    return set(ast.literal_eval(done.stdout.decode()))


def make_some_too_large(at: Scene, cgroup: Path) -> set[tuple[str, int]]:
    """Make both kinds of traffic at a time; return the addresses that the large events are from."""
    with at.steady_traffic():
        at.wait_for_more(101)
        large = exchange_in(cgroup, at.port)
        at.wait_for_more(101)
    at.balance = at.run.finish()
    return large


def assert_these_alone_are_lost(at: Scene, large: set[tuple[str, int]]) -> None:
    """Check that all events are in the topic but those from the addresses, which are counted."""
    small = [each for each in at.segments if (each.saddr, each.sport) not in large]
    assert len(small) < len(at.segments)
    assert_same(small, list(once(at.events()).values()))
    at.assert_balance(delivered=len(small), lost={"MSG_SIZE_TOO_LARGE": len(at.segments) - len(small)})


def test_too_large_for_the_broker_among_good_ones(kafka, long_cgroup, tmp_path):
    """The topic's limit is above each good message, and below the batches that they are sent in."""
    create_topics(kafka, "large.", TRANSMIT)
    kafka.create_topic("large.tcp_transmit", settings={"max.message.bytes": "1000"})
    with scene(tmp_path, kafka.bootstrap, "large.") as at:
        large = make_some_too_large(at, long_cgroup)

    assert "sent again one by one topic=large.tcp_transmit error=MSG_SIZE_TOO_LARGE" in at.run.log
    assert_these_alone_are_lost(at, large)


def test_too_large_for_the_client_among_good_ones(kafka, long_cgroup, tmp_path):
    create_topics(kafka, "limited.")
    with scene(tmp_path, kafka.bootstrap, "limited.", settings={"message.max.bytes": 1000}) as at:
        large = make_some_too_large(at, long_cgroup)

    assert_these_alone_are_lost(at, large)


def test_refused_for_a_reason_that_does_not_pass(kafka, tmp_path):
    """The topic takes no message that is older than a millisecond, until that is changed."""
    create_topics(kafka, "refused.")
    limit = "message.timestamp.before.max.ms"
    kafka.set_topic("refused.tcp_transmit", {limit: "1"})
    with scene(tmp_path, kafka.bootstrap, "refused.") as at:
        at.exchange()
        at.run.wait_for("ERROR kafka: .* lost topic=refused.tcp_transmit error=INVALID_TIMESTAMP")
        kafka.set_topic("refused.tcp_transmit", {limit: "3600000"})
        topics.wait_for_events(kafka.bootstrap, "refused.tcp_transmit", at.exchange)
        at.balance = at.run.finish()

    events = list(once(at.events()).values())
    assert not Counter(map(topics.segment, events)) - Counter(at.segments)
    at.assert_balance(delivered=len(events), lost={"INVALID_TIMESTAMP": len(at.segments) - len(events)})


def test_slow_broker(kafka, tmp_path):
    """The broker lets the client wait for its answers, so that it falls behind, and catches up when the quota ends."""
    create_topics(kafka, "slow.")
    with scene(tmp_path, kafka.bootstrap, "slow.", settings={"client.id": "slowed"}) as at:
        with kafka.slow("slowed", 50_000):
            make_segments(at, 20_000)
            at.wait_for_reason("slow.tcp_transmit: events wait on disk")
        at.finish()

    at.assert_nothing_is_missing()


@pytest.mark.parametrize("by", [PLAIN, SCRAM, "certificate"])
def test_a_user_who_is_granted_it_delivers(secure, tmp_path, by):
    prefix = f"by-{by}."
    create_topics(secure, prefix)
    user, listener, settings = USERS.get(by), "SASL_SSL", {}
    if user is None:
        user, listener = "CN=client", "MUTUAL"
        settings = secure.tls(secure.authority.issue("client"))
    else:
        settings = secure.sasl(by)
    grant(secure, user, prefix)
    with scene(tmp_path, secure.bootstrap, prefix, brokers=secure.address(listener), settings=settings) as at:
        at.exchange()
        at.finish()

    at.assert_nothing_is_missing()
    assert "WARNING kafka" not in at.run.log


def grant(secure: SecureKafka, user: str, prefix: str) -> None:
    for topic in (TRANSMIT, RETRANSMIT, AGENT):
        secure.grant(user, prefix + topic)


def test_topic_not_authorised_any_more_hurts_no_other(secure, tmp_path):
    create_topics(secure, "revoked.")
    user, port = USERS[PLAIN], free_port()
    grant(secure, user, "revoked.")
    brokers = secure.address("SASL_SSL")
    with scene(
        tmp_path, secure.bootstrap, "revoked.", brokers=brokers, settings=secure.sasl(PLAIN), ports=(port,)
    ) as at:
        at.exchange()
        at.wait_for_delivery()
        secure.revoke(user, "revoked.tcp_transmit")
        at.exchange()
        at.run.wait_for("WARNING kafka: .*revoked.tcp_transmit.*TOPIC_AUTHORIZATION_FAILED")
        at.wait_for_reason("revoked.tcp_transmit: kafka: TOPIC_AUTHORIZATION_FAILED")
        retransmitted_syn(port)
        topics.wait_for_events(secure.bootstrap, "revoked.tcp_retransmit")
        secure.grant(user, "revoked.tcp_transmit")
        at.exchange()
        at.finish()

    assert_other_port_too(at, port)


def test_sasl_password_refused_until_the_broker_has_it(secure, tmp_path):
    create_topics(secure, "password.")
    grant(secure, USERS[SCRAM], "password.")
    settings = secure.sasl(SCRAM, "next")
    try:
        with scene(
            tmp_path, secure.bootstrap, "password.", brokers=secure.address("SASL_SSL"), settings=settings
        ) as at:
            at.exchange()
            at.run.wait_for("WARNING kafka: .*invalid credentials.* error=_AUTHENTICATION")
            at.wait_for_reason("kafka: _AUTHENTICATION")
            secure.set_password(USERS[SCRAM], "next")
            at.exchange()
            at.finish()
    finally:
        secure.set_password(USERS[SCRAM], PASSWORD)

    at.assert_nothing_is_missing()


@pytest.mark.parametrize("bad", ["expired", "untrusted"])
def test_certificate_refused_until_it_is_renewed(secure, tmp_path, bad):
    prefix = f"{bad}."
    create_topics(secure, prefix)
    by = Authority(tmp_path / "other") if bad == "untrusted" else secure.authority
    secure.present(by.issue("broker", expired=bad == "expired"))
    try:
        with scene(tmp_path, secure.bootstrap, prefix, brokers=secure.address("TLS"), settings=secure.tls()) as at:
            at.exchange()
            at.run.wait_for("WARNING kafka: .*certificate verify failed")
            at.wait_for_reason("kafka: _SSL")
            secure.present(secure.certificate)
            at.exchange()
            at.finish()
    finally:
        secure.present(secure.certificate)

    at.assert_nothing_is_missing()


def deliver_what_waits(folder: Path, bootstrap: str, at: Scene) -> Scene:
    """Start again with what a scene has left on disk, and end once the topic has it."""
    with scene(folder, bootstrap, at.prefix) as again:
        wait_until("the topic has all", lambda: len(once(at.events())) >= len(at.segments))
        again.finish()
    return again


# A TLS listener hangs up on a client without TLS, and says nothing.
@pytest.mark.parametrize(
    ("client", "says"), [("TLS", "connecting to a PLAINTEXT broker listener"), ("PLAINTEXT", "brokers are down")]
)
def test_tls_against_plaintext(secure, tmp_path, client, says):
    """A mistake in the settings, that only another start can mend: it has all that was captured in the meantime."""
    prefix = f"mistaken-{client}."
    create_topics(secure, prefix)
    settings = secure.tls() if client == "TLS" else {}
    brokers = secure.bootstrap if client == "TLS" else secure.address("TLS")
    with scene(tmp_path, secure.bootstrap, prefix, brokers=brokers, settings=settings, stop_timeout_s=0.1) as at:
        at.exchange()
        at.run.wait_for(f"WARNING kafka: .*{says}")
        at.wait_for_reason("kafka: (_TRANSPORT|_ALL_BROKERS_DOWN)")
        at.balance = at.run.finish()
    account = at.balance[prefix + TRANSMIT]
    assert_accounted(account)
    assert account["passed"] == account["spooled"] == len(at.segments)

    again = deliver_what_waits(tmp_path, secure.bootstrap, at)

    assert_same(at.segments, list(once(at.events()).values()))
    again.assert_balance(delivered=len(at.segments))
    assert again.balance[prefix + TRANSMIT]["carried"] == len(at.segments)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose state folder has room for 1 MiB."""
    state = tmp_path / "run" / "state"
    state.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", state], check=True)
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
