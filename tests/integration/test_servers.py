"""The test servers are real: data survive a crash, and kcat reads them byte for byte."""

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import confluent_kafka
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.error import SchemaRegistryError

from tests.support.rebpf import wait_until
from tests.support.servers.certificates import Authority
from tests.support.servers.cluster import KafkaCluster
from tests.support.servers.consume import kcat_messages
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.registry import SchemaRegistry
from tests.support.servers.secure import PASSWORD, PLAIN, SCRAM, USERS

pytestmark = pytest.mark.real_kafka

# Hard for text readers: line ends, NUL, kcat's own header, bytes that are not UTF-8, empty and null.
AWKWARD = [b"", b"\n", b"\x00", b"0 0 0 1 1\n", b"%s%k\\n", bytes(range(256)), b"\xff" * 1009, None]


def avro(*fields: str) -> Schema:
    return Schema(f'{{"type": "record", "name": "R", "fields": [{", ".join(fields)}]}}', "AVRO")


LONG = avro('{"name": "a", "type": "long"}')
LONG_AND_MORE = avro('{"name": "a", "type": "long"}', '{"name": "b", "type": "int", "default": 0}')
STRING = avro('{"name": "a", "type": "string"}')


def produce(bootstrap, topic, pairs, settings=None):
    """Produce and return the names of the errors in the delivery reports."""
    reports = []
    producer = confluent_kafka.Producer({"bootstrap.servers": bootstrap, "acks": "all", **(settings or {})})
    for key, value in pairs:
        producer.produce(topic, value, key, on_delivery=lambda error, _: reports.append(error))
    assert producer.flush(30) == 0
    assert len(reports) == len(pairs)
    return [error.name() for error in reports if error is not None]


def test_kcat_reads_every_byte_that_was_produced(kafka):
    kafka.create_topic("awkward", 3)
    pairs = [(key, value) for key in AWKWARD for value in AWKWARD]
    before_ms = time.time_ns() // 1_000_000

    assert produce(kafka.bootstrap, "awkward", pairs) == []
    messages = kcat_messages(kafka.bootstrap, "awkward")

    assert Counter((m.key, m.value) for m in messages) == Counter(pairs)
    assert all(before_ms <= m.timestamp_ms <= time.time_ns() // 1_000_000 for m in messages)


def test_kcat_reads_each_offset_of_each_partition_once(kafka):
    kafka.create_topic("counted", 3)

    pairs = [(str(i).encode(), os.urandom(i % 97)) for i in range(1009)]
    assert produce(kafka.bootstrap, "counted", pairs) == []
    messages = kcat_messages(kafka.bootstrap, "counted")

    assert len(messages) == 1009
    sizes = Counter(m.partition for m in messages)
    assert sizes.keys() == {0, 1, 2}
    assert {(m.partition, m.offset) for m in messages} == {(p, o) for p in sizes for o in range(sizes[p])}


def test_reading_a_topic_ends_although_it_is_written_to_all_the_time(kafka):
    kafka.create_topic("busy", 1)
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka.bootstrap, "linger.ms": 0})
    done = threading.Event()

    def write():
        while not done.wait(0.05):
            producer.produce("busy", b"value")
            producer.poll(0)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            wait_until("messages", lambda: kcat_messages(kafka.bootstrap, "busy"))
        finally:
            done.set()
        writing.result()
    assert producer.flush(30) == 0


def test_an_empty_topic_reads_as_no_messages(kafka):
    kafka.create_topic("empty")

    assert kcat_messages(kafka.bootstrap, "empty") == []


def test_reading_a_missing_topic_fails(kafka):
    with pytest.raises(RuntimeError, match="Unknown topic"):
        kcat_messages(kafka.bootstrap, "never-created")


@pytest.mark.extended
@pytest.mark.usefixtures("servers_present")
def test_a_killed_broker_restarts_on_its_port_with_its_messages(tmp_path):
    pairs = [(str(i).encode(), os.urandom(101)) for i in range(503)]
    with KafkaServer(tmp_path, num_partitions=2) as kafka:
        kafka.create_topic("kept")
        assert produce(kafka.bootstrap, "kept", pairs) == []
        bootstrap, messages = kafka.bootstrap, kcat_messages(kafka.bootstrap, "kept")

        kafka.kill()
        kafka.start()

        assert kafka.bootstrap == bootstrap
        assert sorted(kcat_messages(bootstrap, "kept")) == sorted(messages)
    assert Counter((m.key, m.value) for m in messages) == Counter(pairs)
    assert {m.partition for m in messages} == {0, 1}


@pytest.mark.usefixtures("servers_present")
def test_settings_reach_the_broker(tmp_path):
    with KafkaServer(tmp_path, settings={"message.max.bytes": "1000"}) as kafka:
        kafka.create_topic("small")

        assert produce(kafka.bootstrap, "small", [(b"key", bytes(2000))]) == ["MSG_SIZE_TOO_LARGE"]
        assert produce(kafka.bootstrap, "small", [(b"key", bytes(500))]) == []


@pytest.fixture
def client(registry):
    with SchemaRegistryClient({"url": registry.url, "timeout": 10}) as client:
        yield client


def test_a_schema_under_two_subjects_has_one_id(client):
    one, other = client.register_schema("one-value", LONG), client.register_schema("other-value", LONG)

    assert one == other
    assert client.get_schema(one).schema_str == LONG.schema_str
    assert {"one-value", "other-value"} <= set(client.get_subjects())


def test_full_transitive_lets_a_compatible_schema_in_and_refuses_others_with_409(client):
    client.register_schema("strict-value", LONG)
    client.set_compatibility("strict-value", "FULL_TRANSITIVE")

    client.register_schema("strict-value", LONG_AND_MORE)
    with pytest.raises(SchemaRegistryError) as refusal:
        client.register_schema("strict-value", STRING)

    assert refusal.value.http_status_code == 409
    assert client.get_versions("strict-value") == [1, 2]


def test_an_unknown_subject_is_404(client):
    with pytest.raises(SchemaRegistryError) as refusal:
        client.get_latest_version("never-registered-value")

    assert (refusal.value.http_status_code, refusal.value.error_code) == (404, 40401)


@pytest.mark.extended
@pytest.mark.usefixtures("servers_present")
def test_a_killed_registry_restarts_at_its_url_with_its_ids(tmp_path):
    with SchemaRegistry(tmp_path) as registry:
        url = registry.url
        with SchemaRegistryClient({"url": url, "timeout": 10}) as client:
            schema_id = client.register_schema("kept-value", LONG)

        registry.kill()
        registry.start()

        assert registry.url == url
        with SchemaRegistryClient({"url": url, "timeout": 10}) as client:
            assert client.get_latest_version("kept-value").schema_id == schema_id


ONE = [(b"key", b"value")]


@pytest.mark.parametrize("mechanism", [PLAIN, SCRAM])
def test_a_sasl_user_may_produce_while_that_is_granted(secure, mechanism):
    topic = f"sasl-{mechanism}"
    secure.create_topic(topic)
    address, settings = secure.address("SASL_SSL"), secure.sasl(mechanism)

    assert produce(address, topic, ONE, settings) == ["TOPIC_AUTHORIZATION_FAILED"]
    secure.grant(USERS[mechanism], topic)
    assert produce(address, topic, ONE, settings) == []
    secure.revoke(USERS[mechanism], topic)
    assert produce(address, topic, ONE, settings) == ["TOPIC_AUTHORIZATION_FAILED"]

    assert len(kcat_messages(secure.bootstrap, topic)) == 1


def test_a_client_certificate_is_a_user(secure):
    secure.create_topic("mutual")
    secure.grant("CN=client", "mutual")

    assert produce(secure.address("MUTUAL"), "mutual", ONE, secure.tls(secure.authority.issue("client"))) == []


def refusal(address, settings):
    """Return the client's first error."""
    errors = []
    client = confluent_kafka.Producer(
        {"bootstrap.servers": address, "error_cb": errors.append, "log_level": 0, **settings}
    )
    wait_until("an error", lambda: client.poll(0.1) or errors)
    return errors[0].str()


def test_a_client_without_a_good_certificate_or_password_is_refused(secure):
    expired = secure.authority.issue("client", expired=True)

    assert "alert bad certificate" in refusal(secure.address("MUTUAL"), secure.tls())
    assert "alert certificate unknown" in refusal(secure.address("MUTUAL"), secure.tls(expired))
    assert "invalid credentials" in refusal(secure.address("SASL_SSL"), secure.sasl(SCRAM, "wrong"))


def test_a_certificate_of_the_broker_that_expired_or_is_anothers_is_refused_until_it_is_renewed(secure, tmp_path):
    secure.create_topic("renewed")
    expired = secure.authority.issue("broker", expired=True)
    for bad in (expired, Authority(tmp_path / "other").issue("broker")):
        secure.present(bad)
        assert "certificate verify failed" in refusal(secure.address("TLS"), secure.tls())
    secure.present(secure.certificate)

    assert produce(secure.address("TLS"), "renewed", ONE, secure.tls()) == []


def test_a_password_can_be_changed_while_the_broker_runs(secure):
    secure.create_topic("changed")
    secure.grant(USERS[SCRAM], "changed")
    secure.set_password(USERS[SCRAM], "new")
    try:
        assert produce(secure.address("SASL_SSL"), "changed", ONE, secure.sasl(SCRAM, "new")) == []
    finally:
        secure.set_password(USERS[SCRAM], PASSWORD)


@pytest.mark.extended
@pytest.mark.usefixtures("servers_present")
def test_a_cluster_bears_the_loss_of_one_node_and_refuses_with_one_left(tmp_path):
    with KafkaCluster(tmp_path) as cluster:
        cluster.create_topic("shared")
        assert set(cluster.leaders("shared").values()) == {1, 2, 3}
        assert produce(cluster.bootstrap, "shared", ONE) == []

        cluster.nodes[2].kill()
        wait_until("others lead", lambda: set(cluster.leaders("shared").values()) == {1, 3})
        assert produce(cluster.bootstrap, "shared", ONE) == []

        cluster.nodes[3].pause()
        wait_until("one is left", lambda: all(each == {1} for each in cluster.in_sync("shared").values()))
        once = {"retries": 0, "message.timeout.ms": 5000}
        assert produce(cluster.bootstrap, "shared", ONE, once) == ["NOT_ENOUGH_REPLICAS"]

        cluster.nodes[3].resume()
        cluster.nodes[2].start()
        wait_until("all are back", lambda: all(each == {1, 2, 3} for each in cluster.in_sync("shared").values()))
        assert produce(cluster.bootstrap, "shared", ONE) == []
        assert len(kcat_messages(cluster.bootstrap, "shared")) == 3


def test_a_producer_with_a_quota_waits_until_it_is_lifted_and_others_do_not(kafka):
    """It sends 300 requests of 1 KB each. The broker counts over 10 s: at 10 KB/s about 100 may go at once."""
    kafka.create_topic("slow")
    waits = {"limited": [], "other": []}

    def client(name):
        settings = {"client.id": name, "batch.num.messages": 1, "linger.ms": 0}
        settings["throttle_cb"] = lambda event: waits[name].append(event.throttle_time)
        return confluent_kafka.Producer({"bootstrap.servers": kafka.bootstrap, **settings})

    limited, other = client("limited"), client("other")
    with kafka.slow("limited", 10_000):
        for producer in (limited, other):
            for _ in range(300):
                producer.produce("slow", os.urandom(1000))
        assert other.flush(30) == 0
        wait_until("the broker throttles", lambda: limited.poll(0.1) >= 0 and any(waits["limited"]))
        assert len(limited) > 0
    assert limited.flush(30) == 0
    assert not any(waits["other"])
