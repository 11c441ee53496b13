"""`rebpf run` against a healthy Kafka: every segment once, and no own traffic."""

import json
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator

import confluent_kafka
import pytest

from tests.support import procfs, topics
from tests.support.rebpf import Run, rebpf, wait_until
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import free_port
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT
from tests.support.traffic import Echo, exchange
from tests.support.wire import captured

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

CONNECTIONS = 1009
PARTITIONS = 6
FIN, SYN, ACK = 1, 2, 16


def init(run_config: str, tmp_path, kafka: KafkaServer) -> None:
    config = tmp_path / "init.toml"
    config.write_text(run_config)
    done = rebpf("init", "--config", config, "--brokers", kafka.bootstrap, "--partitions", PARTITIONS)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


@pytest.fixture(scope="module")
def outcome(kafka, tmp_path_factory):
    """1,009 connections of 10 segments of data each."""
    tmp_path = tmp_path_factory.mktemp("many")
    config = '[kafka]\ntopic_prefix = "many."\n'
    init(config, tmp_path, kafka)
    with Echo() as echo, captured(echo.port) as segments:
        arguments = ["--brokers", kafka.bootstrap, "--port", echo.port]
        with Run(tmp_path, *arguments, config=config) as run:
            assert run.ready() == kafka.bootstrap
            sent = exchange(echo.port, CONNECTIONS)
            balance = run.finish()
    events = {topic: topics.read(kafka.bootstrap, topic, "many.") for topic in (TRANSMIT, RETRANSMIT)}
    return sent, segments, balance, events


def test_the_topic_has_each_segment_of_an_independent_capture_once(outcome):
    _, segments, _, events = outcome
    assert segments.total() > 16 * CONNECTIONS  # handshake and end: 6
    assert Counter(map(topics.segment, events[TRANSMIT])) == segments
    topics.assert_none_twice(events[TRANSMIT])


def test_payload_and_flags_are_those_that_the_sender_knows(outcome):
    sent, _, _, events = outcome
    payload, syns, fins = defaultdict(dict), defaultdict(set), defaultdict(set)
    for event in events[TRANSMIT]:
        segment = topics.segment(event)
        flow, flags = segment[:4], segment.tcp_flags
        payload[flow][segment.seq] = segment.payload_len  # by seq: a retransmission counts once
        if flags & SYN:
            syns[flow].add((segment.seq, bool(flags & ACK)))
        if flags & FIN:
            fins[flow].add(event.record["end_seq"])

    assert {flow: sum(sizes.values()) for flow, sizes in payload.items()} == {each[:4]: each[4] for each in sent}
    client_side = {each[:4] for each in sent[::2]}
    assert {flow: [from_server for _, from_server in seen] for flow, seen in syns.items()} == {
        each[:4]: [each[:4] not in client_side] for each in sent
    }
    assert {flow: len(seen) for flow, seen in fins.items()} == {each[:4]: 1 for each in sent}


def test_passed_is_what_was_delivered_and_what_the_topics_hold(outcome):
    _, _, balance, events = outcome
    for topic in (TRANSMIT, RETRANSMIT):
        topics.assert_complete(balance[f"many.{topic}"], events[topic])


def test_without_a_registry_the_ids_in_the_frames_are_the_documented_ones(outcome):
    *_, events = outcome
    for topic in (TRANSMIT, RETRANSMIT):
        assert {event.schema_id for event in events[topic]} <= {topics.FIXED_IDS[topic]}


def test_the_key_is_the_host_and_its_partition_the_java_clients(outcome):
    *_, events = outcome
    for event in events[TRANSMIT] + events[RETRANSMIT]:
        key = event.record["host"].encode()
        assert event.message.key == key
        assert event.message.partition == topics.partition(key, PARTITIONS)


def assert_flows_in_order(events: list[topics.Event]) -> None:
    """By sequence number, which within a direction decreases only in retransmissions."""
    ends: dict[tuple[object, ...], int] = {}
    for event in events:
        record = event.record
        flow = tuple(record[name] for name in ("saddr", "sport", "daddr", "dport"))
        if not record["is_retransmit"]:
            step = record["seq"] - ends.get(flow, record["seq"]) & 0xFFFFFFFF
            assert step == 0, (flow, record)
            ends[flow] = record["end_seq"]


def test_a_flow_stays_in_order(outcome):
    *_, events = outcome
    assert_flows_in_order(events[TRANSMIT])


def test_events_can_be_spread_by_flow_and_a_flow_stays_in_order(kafka, tmp_path, echo):
    """The topic begins with events by host: readers must do with both."""
    config = '[kafka]\ntopic_prefix = "keys."\n'
    init(config, tmp_path, kafka)
    for number, key in enumerate(("host", "flow")):
        arguments = ["--brokers", kafka.bootstrap, "--port", echo.port]
        with Run(tmp_path / "run", *arguments, config=f'{config}key = "{key}"\n') as run:
            run.ready()
            exchange(echo.port, 101)
            run.finish()
        events = topics.read(kafka.bootstrap, TRANSMIT, "keys.")
        by_host = [event for event in events if event.message.key == event.record["host"].encode()]
        by_flow = [event for event in events if event not in by_host]
        assert len(by_host) > 16 * 101
        if number == 0:
            assert not by_flow
    for event in by_flow:
        record = event.record
        form = "[{}]:{}>[{}]:{}" if ":" in record["saddr"] else "{}:{}>{}:{}"
        flow = form.format(record["saddr"], record["sport"], record["daddr"], record["dport"]).encode()
        assert event.message.key == flow
        assert event.message.partition == topics.partition(flow, PARTITIONS)
    assert {event.message.partition for event in by_flow} == set(range(PARTITIONS))
    assert_flows_in_order(by_host)
    assert_flows_in_order(by_flow)
    done = rebpf("verify", "--brokers", kafka.bootstrap, "--topic", f"keys.{TRANSMIT}", "--json")
    report = json.loads(done.stdout)[f"keys.{TRANSMIT}"]
    assert [(boot["missing"], boot["duplicates"], boot["out_of_order"]) for boot in report["boots"]] == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # org.apache.kafka.common.utils.UtilsTest
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_these_tests_murmur2_is_kafkas(text, number):
    assert topics.murmur2(text) == number & 0xFFFFFFFF


def ports_to(port: int, pid: int) -> set[int]:
    """Return the local ports of a process's connections to a port."""
    return {each.local[1] for each in procfs.connections(pid) if each.peer[1] == port}


def test_the_producers_connections_are_not_in_its_events_and_other_clients_of_the_broker_are(kafka, tmp_path):
    """Without a filter, and although both use the same port."""
    config = '[kafka]\ntopic_prefix = "own."\n'
    init(config, tmp_path, kafka)
    kafka.create_topic("others")
    port = int(kafka.bootstrap.rpartition(":")[2])

    with Run(tmp_path, "--brokers", kafka.bootstrap, config=config) as run:
        run.ready()
        # Clients of earlier tests may still be connected, idle.
        idle = ports_to(port, os.getpid())
        other = confluent_kafka.Producer({"bootstrap.servers": kafka.bootstrap})
        for number in range(101):
            other.produce("others", str(number))
            assert other.flush(30) == 0
        others = ports_to(port, os.getpid()) - idle
        own = wait_until("the producer is connected", lambda: ports_to(port, run.pid))
        balance = run.finish()

    assert own
    assert others
    events = topics.read(kafka.bootstrap, TRANSMIT, "own.")
    senders = {event.record["sport"] for event in events if event.record["dport"] == port}
    assert others <= senders
    assert not own & senders
    assert not own & {event.record["dport"] for event in events if event.record["sport"] == port}
    sent_by_other = [event for event in events if event.record["sport"] in others and event.record["payload_len"]]
    assert len(sent_by_other) >= 101
    # All of the host's traffic: its amount, and whether the ring can hold it, is unknown.
    account = balance["own.tcp_transmit"]
    assert account["delivered"] == len(events)
    assert account["passed"] == account["delivered"] + sum(account["lost"].values())


def test_without_transmits_no_topic_is_needed_for_them_and_own_connections_have_no_records(kafka, tmp_path, echo):
    config = '[capture]\ntransmit = false\nflow_interval_s = 1\n[kafka]\ntopic_prefix = "fleet."\n'
    init(config, tmp_path, kafka)
    with Run(tmp_path, "--brokers", kafka.bootstrap, config=config) as run:
        run.ready()
        with socket.create_connection(("127.0.0.1", echo.port)) as client:
            port = client.getsockname()[1]
            wait_until(
                "a record of an open connection",
                lambda: any(event.record["sport"] == port for event in topics.read(kafka.bootstrap, FLOW, "fleet.")),
            )
        sent = exchange(echo.port, 53)
        balance = run.finish()
    assert balance.keys() == {"fleet.tcp_retransmit", "fleet.tcp_flow"}
    admin = confluent_kafka.admin.AdminClient({"bootstrap.servers": kafka.bootstrap})
    names = {name for name in admin.list_topics(timeout=10).topics if name.startswith("fleet.")}
    assert names == {"fleet.tcp_retransmit", "fleet.tcp_flow", "fleet.rebpf_agent"}

    records = topics.distinct(topics.read(kafka.bootstrap, FLOW, "fleet."))
    closed = Counter(each["sport"] for each in records if each["reason"] == "close" and each["dport"] == echo.port)
    assert Counter(each.sport for each in sent[::2]) <= closed
    broker = int(kafka.bootstrap.rpartition(":")[2])
    assert run.pid not in {each["pid"] for each in records}
    clients = {each["sport"] for each in records if each["dport"] == broker}
    assert {each["dport"] for each in records if each["sport"] == broker} <= clients, "the other end of an own one"


def test_spooled_events_of_a_stream_that_was_turned_off_are_delivered(kafka, tmp_path, echo):
    config = '[kafka]\ntopic_prefix = "off."\n[spool]\nspill_after_s = 0.1\n'
    init(config, tmp_path, kafka)
    arguments = ["--port", echo.port]
    with Run(tmp_path, "--brokers", f"127.0.0.1:{free_port()}", *arguments, config=config) as run:
        run.ready()
        exchange(echo.port, 53)
        spooled = run.finish()["off.tcp_transmit"]["spooled"]
    assert spooled > 16 * 53
    config += "[capture]\ntransmit = false\n"
    with Run(tmp_path, "--brokers", kafka.bootstrap, *arguments, config=config) as run:
        run.ready()
        exchange(echo.port, 3)
        wait_until("all is delivered", lambda: len(topics.read(kafka.bootstrap, TRANSMIT, "off.")) >= spooled)
        balance = run.finish()["off.tcp_transmit"]
    assert balance["passed"] == balance["carried"] == balance["delivered"] == spooled
    topics.assert_one_each(topics.read(kafka.bootstrap, TRANSMIT, "off."))
    with Run(tmp_path, "--brokers", kafka.bootstrap, *arguments, config=config) as run:
        run.ready()
        assert "off.tcp_transmit" not in run.finish()


def test_a_service_managers_socket_that_is_gone_ends_nothing(tmp_path):
    # A shell that a service started passes NOTIFY_SOCKET on, also after the service has ended.
    with Run(tmp_path, env={"NOTIFY_SOCKET": str(tmp_path / "gone")}) as run:
        run.ready()
        run.wait_for("systemd: cannot send READY=1: .*No such file")
        run.finish()
