"""The test servers are real: they keep what they are given over a crash, and kcat reads it byte for byte."""

import os
import time
from collections import Counter

import confluent_kafka
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.error import SchemaRegistryError

from tests.servers.consume import kcat_messages
from tests.servers.kafka import KafkaServer
from tests.servers.registry import SchemaRegistry

pytestmark = pytest.mark.real_kafka

# What trips a reader of text: line ends, NUL, kcat's own header, bytes that are not UTF-8, empty beside null.
AWKWARD = [b"", b"\n", b"\x00", b"0 0 0 1 1\n", b"%s%k\\n", bytes(range(256)), b"\xff" * 1009, None]


def avro(*fields: str) -> Schema:
    return Schema(f'{{"type": "record", "name": "R", "fields": [{", ".join(fields)}]}}', "AVRO")


LONG = avro('{"name": "a", "type": "long"}')
LONG_AND_MORE = avro('{"name": "a", "type": "long"}', '{"name": "b", "type": "int", "default": 0}')
STRING = avro('{"name": "a", "type": "string"}')


def produce(bootstrap, topic, pairs):
    """Produce and return the names of the errors in the delivery reports."""
    reports = []
    producer = confluent_kafka.Producer({"bootstrap.servers": bootstrap, "acks": "all"})
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


def test_an_empty_topic_reads_as_no_messages(kafka):
    kafka.create_topic("empty")

    assert kcat_messages(kafka.bootstrap, "empty") == []


def test_reading_a_topic_that_is_not_there_fails(kafka):
    with pytest.raises(RuntimeError, match="Unknown topic"):
        kcat_messages(kafka.bootstrap, "never-created")


@pytest.mark.usefixtures("servers_present")
def test_a_killed_broker_comes_back_on_its_port_with_its_messages(tmp_path):
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


@pytest.mark.usefixtures("servers_present")
def test_a_killed_registry_comes_back_at_its_url_with_its_ids(tmp_path):
    with SchemaRegistry(tmp_path) as registry:
        url = registry.url
        with SchemaRegistryClient({"url": url, "timeout": 10}) as client:
            schema_id = client.register_schema("kept-value", LONG)

        registry.kill()
        registry.start()

        assert registry.url == url
        with SchemaRegistryClient({"url": url, "timeout": 10}) as client:
            assert client.get_latest_version("kept-value").schema_id == schema_id
