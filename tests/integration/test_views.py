"""`rebpf top` on the topics of three hosts, in a real Kafka: the peer that loses, and rates from the first table on."""

import json
import threading

import pytest
from confluent_kafka import Producer

from producer.commands.top import once
from producer.config.load import Registry
from producer.encode.batch import BatchEncoder
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Batch, Rows, Stream
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from producer.view.keys import Choice
from producer.view.topics import TopicSource
from tests.support.encoding import OFFSET_NS, messages
from tests.support.rebpf import wait_until
from tests.support.servers.kafka import KafkaServer
from tests.support.views import flows, retransmits, transmits

pytestmark = pytest.mark.real_kafka

PREFIX = "views."
HOSTS, PEERS = ("web-1", "web-2", "db-1"), [f"10.2.0.{number}" for number in range(1, 21)]
GUILTY = PEERS[6]


def put(client: Producer, stream: Stream, host: str, rows: Rows, **where: int) -> None:
    schema, fields = load_schema(stream.schema_file), {"host": host, "boot_id": f"boot of {host}"}
    encoder = BatchEncoder(stream, schema, stream.fixed_schema_id, fields, CgroupPaths(None), "host")
    for _, value in messages(encoder.encode(Batch(stream, rows), OFFSET_NS)):
        client.produce(PREFIX + stream.topic, value, host, **where)
    assert client.flush(30) == 0


def connections(segs_out: int, lost: int) -> Rows:
    """Return records of a connection to each peer, of which one has retransmissions."""
    return flows(
        *(
            {"reason": "interval", "sk_cookie": 1 + at, "daddr": peer, "segs_out": segs_out, "start_ns": 0}
            | {"total_retrans": lost if peer == GUILTY else 0}
            for at, peer in enumerate(PEERS)
        )
    )


def test_the_first_table_of_a_fleet_has_rates(kafka: KafkaServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Producers report a connection every 10 seconds: to what its next record is compared was sent before the view."""
    client = Producer({"bootstrap.servers": kafka.bootstrap})
    for stream in (FLOWS, RETRANSMITS):
        kafka.create_topic(PREFIX + stream.topic, 3)
    for host in HOSTS:
        put(client, FLOWS, host, connections(1000, 10))
    stop, topics = threading.Event(), [PREFIX + stream.topic for stream in (RETRANSMITS, FLOWS)]
    view = TopicSource(kafka.bootstrap, topics, registry=Registry(None), client_settings={}, stop=stop)

    def send() -> None:
        for host in HOSTS:
            put(client, FLOWS, host, connections(1100, 15))
            put(client, RETRANSMITS, host, retransmits({"cause": "rto", "sk_cookie": 7, "daddr": GUILTY, "segs": 5}))

    timer = threading.Timer(4.0, send)
    timer.start()
    try:
        once(view, Choice(), 10.0, "fleet", stop, as_json=True, width=80)
    finally:
        timer.join()
        client.close()
    found = json.loads(capsys.readouterr().out)
    worst, covered_s = found["lines"][0], found["window_s"]
    assert (worst["name"], worst["ratio"], worst["causes"], worst["flows"]) == (GUILTY, 0.05, {"rto": 15}, 3)
    assert worst["segments"] * covered_s == pytest.approx(300, rel=0.001)
    assert worst["retransmitted"] * covered_s == pytest.approx(15, rel=0.001)
    assert found["total"]["segments"] * covered_s == pytest.approx(300 * len(PEERS), rel=0.001)
    assert found["groups"] == len(PEERS)


def test_partitions_that_are_added_are_read(kafka: KafkaServer) -> None:
    topic, stop = PREFIX + TRANSMITS.topic, threading.Event()
    kafka.create_topic(topic, 1)
    with TopicSource(kafka.bootstrap, [topic], registry=Registry(None), client_settings={}, stop=stop) as view:
        kafka.add_partitions(topic, 3)
        client = Producer({"bootstrap.servers": kafka.bootstrap})
        client.list_topics(topic, timeout=30)
        put(client, TRANSMITS, "web-1", transmits({}), partition=2)
        wait_until("the event is read", view.read)
