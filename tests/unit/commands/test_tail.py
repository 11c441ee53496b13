"""`rebpf tail` against the mock cluster: each event once, in its partition's order."""

import io
import json
import socket
import struct
import subprocess
import threading
from collections.abc import Generator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fastavro
import pytest

from producer.commands.tail import Chosen, Event, batches, tail
from producer.config.load import Registry
from producer.consume.period import Period
from producer.errors import ConfigError, UnavailableError
from producer.events import RETRANSMITS, TRANSMITS
from producer.paths import SCHEMAS
from producer.view.filter import parse
from tests.support.mock_topics import TOPICS, Cluster
from tests.support.rebpf import DEADLINE_S, command
from tests.support.records import TRANSMIT, VALUES, message


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def follow(cluster: Cluster, topics: Sequence[str] = TOPICS, *, from_beginning: bool = True) -> Generator[list[Event]]:
    return batches(
        cluster.brokers,
        topics,
        registry=None,
        from_beginning=from_beginning,
        stop=threading.Event(),
        client_settings={},
    )


def take(source: Iterator[list[Event]], count: int) -> list[Event]:
    """Read until there are `count` events; the test's timeout is the deadline."""
    taken: list[Event] = []
    while len(taken) < count:
        taken += next(source)
    return taken


def print_events(cluster: Cluster, *, as_json: bool, limit: int | None) -> None:
    tail(
        cluster.brokers,
        TOPICS,
        registry=None,
        as_json=as_json,
        limit=limit,
        color=False,
        from_beginning=True,
        stop=threading.Event(),
        client_settings={},
    )


def test_json_lines_have_topic_key_and_raw_numbers(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for stream in (TRANSMITS, RETRANSMITS):
        cluster.put_events(stream, [11])
    print_events(cluster, as_json=True, limit=2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["topic"] for line in lines} == {TRANSMITS.topic, RETRANSMITS.topic}
    assert [(line["key"], line["seq"], line["ts"]) for line in lines] == [("a:1>b:2", 11, VALUES["long"])] * 2


def test_a_limit_is_the_number_of_lines(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.put_events(TRANSMITS, range(13))
    print_events(cluster, as_json=False, limit=7)
    titles, _day, *events = capsys.readouterr().out.splitlines()
    assert (titles.split()[:3], len(events)) == (["TIME", "CAUSE", "HOST"], 7)


def test_past_events_of_topics_that_do_not_exist_are_an_error(cluster: Cluster) -> None:
    with pytest.raises(UnavailableError, match=f"^no topic tcp_flow at {cluster.brokers}$"):
        tail(
            cluster.brokers, ["tcp_flow"], registry=None, as_json=False, limit=None, color=False,
            from_beginning=True, stop=threading.Event(), client_settings={}, chosen=Chosen(period=Period(until_ns=1)),
        )  # fmt: skip


def print_chosen(cluster: Cluster, chosen: Chosen) -> None:
    tail(
        cluster.brokers,
        TOPICS,
        registry=None,
        as_json=True,
        limit=None,
        color=False,
        from_beginning=True,
        stop=threading.Event(),
        client_settings={},
        chosen=chosen,
    )


def test_with_until_what_exists_is_shown_and_nothing_later(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        cluster.put(TRANSMITS.topic, message(TRANSMITS, seq=number, ts_ns=1000 + number))
    print_chosen(cluster, Chosen(period=Period(until_ns=1003)))
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2]


def test_a_period_is_of_the_events_time_and_not_of_when_they_were_sent(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """The in-process test broker does not find messages by their time, so all are read."""
    for number in range(5):
        cluster.put(TRANSMITS.topic, message(TRANSMITS, seq=number, ts_ns=1000 + number))
    print_chosen(cluster, Chosen(period=Period(1001, 1003)))
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


def test_a_period_is_of_alerts_and_heartbeats_too() -> None:
    given = [Event("tcp_alerts", "a", {"ts": ms, "rule": "loss"}) for ms in range(1, 6)]
    assert Chosen(period=Period(2_000_000, 4_000_000)).events(given) == given[1:3]


def test_from_a_time_on_what_exists_is_shown_and_what_arrives(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, range(3))
    source = batches(
        cluster.brokers, TOPICS, registry=None, from_beginning=False, stop=threading.Event(), client_settings={},
        since_ms=1000,
    )  # fmt: skip
    assert [event.record["seq"] for event in take(source, 3)] == [0, 1, 2]


def test_a_filter_chooses_events(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        cluster.put(TRANSMITS.topic, message(TRANSMITS, seq=number, sport=number % 2, dport=9))
    cluster.put(RETRANSMITS.topic, message(RETRANSMITS, seq=9, sport=1, dport=9, cause="tlp"))
    print_chosen(cluster, Chosen(matches=parse("port 1 and not cause tlp"), period=Period(until_ns=1 << 62)))
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [1, 3]


def test_a_filter_chooses_by_labels_and_json_has_them(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for labels in ({"env": "prod", "dc": "a"}, {"env": "test"}, {}):
        cluster.put(TRANSMITS.topic, message(TRANSMITS, labels=labels))
    print_chosen(cluster, Chosen(matches=parse("label env=prod or not label env"), period=Period(until_ns=1 << 62)))
    shown = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
    assert shown == [{"dc": "a", "env": "prod"}, {}]


def test_each_event_is_read_once_and_in_order(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, range(101))
    source = follow(cluster)
    assert [event.record["seq"] for event in take(source, 101)] == list(range(101))
    assert next(source) == []


def test_without_from_beginning_only_what_comes_later_is_read(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, range(5))
    source = follow(cluster, from_beginning=False)
    assert next(source) == []
    cluster.put_events(TRANSMITS, [1000])
    assert [event.record["seq"] for event in take(source, 1)] == [1000]


@pytest.mark.slow
def test_a_topic_that_appears_later_is_read_from_its_beginning(cluster: Cluster) -> None:
    source = follow(cluster, ["late"], from_beginning=False)
    assert next(source) == []
    cluster.put("late", message(TRANSMITS, seq=3))
    assert [(event.topic, event.record["seq"]) for event in take(source, 1)] == [("late", 3)]


def test_foreign_messages_are_skipped_and_counted(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.put(TRANSMITS.topic, b"not avro")
    cluster.put(TRANSMITS.topic, b"not avro either")
    cluster.put_events(TRANSMITS, [17])
    source = follow(cluster)
    assert [event.record["seq"] for event in take(source, 1)] == [17]
    source.close()
    assert 'skipped messages=2 reason="tcp_transmit: not in Confluent\'s wire format"' in caplog.text


ODD: dict[int, dict[str, Any]] = {
    100: {"ts_ns": "x"},
    101: {"ts_ns": 1 << 62, "cause": 5},
    102: {"cause": "rto", "saddr": b"\xff"},
    103: {**{name: 7 for name in TRANSMIT if name != "ts_ns"}, "ts_ns": 1.0e300},
}
"""Records with the name of ours, by the schema's id, whose fields have other types or are missing."""
TYPES = {str: "string", int: "long", bytes: "bytes", float: "double"}


def odd_schema(number: int) -> dict[str, Any]:
    fields = [{"name": name, "type": TYPES[type(value)]} for name, value in ODD[number].items()]
    return {"type": "record", "name": "TcpTransmit", "namespace": "rebpf.v1", "fields": fields}


class OddRegistry(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        number = int(self.path.split("?")[0].rpartition("/")[2])
        schema = odd_schema(number) if number in ODD else json.loads((SCHEMAS / TRANSMITS.schema_file).read_text())
        body = json.dumps({"schema": json.dumps(schema)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def odd_registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OddRegistry) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("as_json", [False, True])
def test_records_of_other_types_are_skipped_and_counted_and_cost_no_other(
    cluster: Cluster,
    odd_registry: str,
    as_json: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number, record in ODD.items():
        buffer = io.BytesIO()
        buffer.write(struct.pack(">bI", 0, number))
        fastavro.schemaless_writer(buffer, fastavro.parse_schema(odd_schema(number)), record)
        cluster.put(TRANSMITS.topic, buffer.getvalue())
    cluster.put_events(TRANSMITS, [17, 18])
    tail(
        cluster.brokers,
        [TRANSMITS.topic],
        registry=Registry(odd_registry),
        as_json=as_json,
        limit=2,
        color=False,
        from_beginning=True,
        stop=threading.Event(),
        client_settings={},
    )
    assert len(capsys.readouterr().out.splitlines()) == (2 if as_json else 4), "titles, a day and two events"
    skipped = [record.args for record in caplog.records if "skipped messages" in record.message]
    assert sum(args[0] for args in skipped if isinstance(args, tuple)) == len(ODD)


def test_reasons_to_skip_messages_are_bounded(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(300):
        cluster.put(TRANSMITS.topic, struct.pack(">bI", 0, 1000 + number))
    cluster.put_events(TRANSMITS, [17])
    source = follow(cluster)
    take(source, 1)
    source.close()
    assert len([record for record in caplog.records if "skipped messages" in record.message]) <= 101
    assert len(caplog.records) <= 210


def test_stop_ends_the_events(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, range(3))
    stop = threading.Event()
    seen = []
    for batch in batches(cluster.brokers, TOPICS, registry=None, from_beginning=True, stop=stop, client_settings={}):
        seen += [event.record["seq"] for event in batch]
        if len(seen) == 3:  # a batch may end before
            stop.set()
    assert seen == [0, 1, 2]


def test_a_setting_that_the_client_does_not_know_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.setting"):
        next(
            batches(
                "127.0.0.1:1",
                TOPICS,
                registry=None,
                from_beginning=True,
                stop=threading.Event(),
                client_settings={"no.such.setting": "1"},
            )
        )


@pytest.mark.slow
def test_a_broker_that_is_down_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # A port on which nobody listens.
        brokers = f"127.0.0.1:{taken.getsockname()[1]}"
        stop = threading.Event()
        source = batches(brokers, TOPICS, registry=None, from_beginning=True, stop=stop, client_settings={})
        with pytest.raises(UnavailableError, match=brokers):
            next(source)


def test_the_earliest_time_is_the_beginning(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, range(3))
    stop = threading.Event()
    source = batches(
        cluster.brokers, TOPICS, registry=None, from_beginning=False, stop=stop, client_settings={}, since_ms=0
    )
    assert len(take(source, 3)) == 3


def test_it_ends_with_its_reader_though_no_event_comes(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, [1])
    with subprocess.Popen(command("tail", "--brokers", cluster.brokers), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"TIME")
        process.stdout.close()
        try:
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
