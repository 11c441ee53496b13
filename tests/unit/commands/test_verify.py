"""`rebpf verify`: topics are read to their end, and events that cannot be decoded cost no others."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread
from typing import Any

import pytest

from producer.commands.verify import TopicReport, fault_summary, show, verify
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.event_id import read_events
from producer.consume.reader import TopicReader
from producer.errors import ConfigError, UnavailableError
from producer.events import FLOWS, RETRANSMITS, STREAMS, TRANSMITS
from tests.support.batches import decoded
from tests.support.mock_topics import TOPICS, Cluster
from tests.support.rebpf import rebpf
from tests.support.records import message


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def reasons(decoder: Decoder, *values: bytes | None) -> list[str]:
    """Return why messages are not events; all of them are read as one batch."""
    return [reason for _, reason in read_events(decoder, list(values))[1]]


def test_a_name_that_is_too_long_is_undecodable() -> None:
    (reason,) = reasons(Decoder(None), message(TRANSMITS, host="x" * 5000))
    assert "4096 characters" in reason
    for long in ("host", "boot_id"):
        fits, reason = message(TRANSMITS, **{long: "x" * 1024}), "out of range, or host or boot_id is too long"
        assert reasons(Decoder(None), fits, message(TRANSMITS, **{long: "x" * 1025})) == [f"cpu_seq is {reason}"]


def test_the_columns_of_events_are_what_their_records_say() -> None:
    values: list[bytes | None] = [
        message(stream, cpu=3, cpu_seq=number, host=f"web-{number % 3}", boot_id="b")
        for number in (1, 1 << 40, 1 << 62)
        for stream in STREAMS
    ]
    decoder = Decoder(None)
    events, rejected = read_events(decoder, values)
    assert (events.rows.tolist(), rejected) == (list(range(len(values))), [])
    for row, value in enumerate(values):
        record = decoded(decoder, value)
        for name, cells in events.cells.items():
            assert (events.texts[cells[row]] if type(record[name]) is str else cells[row]) == record[name]


@pytest.mark.parametrize(
    "value",
    [None, b"", b"\0\0\0\0", b"not avro", message(TRANSMITS)[:9], message(TRANSMITS, cpu_seq=0), b"\0\0\0\0\x09" * 9],
)
def test_a_message_that_is_no_event_is_undecodable_and_affects_no_other(value: bytes | None) -> None:
    good = message(TRANSMITS)
    events, rejected = read_events(Decoder(None), [good, value, good])
    assert (events.rows.tolist(), [row for row, _ in rejected]) == ([0, 2], [1])


def test_a_schema_without_an_event_s_id_is_undecodable() -> None:
    class Other(Decoder):
        def schema(self, schema_id: int) -> Any:
            return {"type": "record", "name": "Other", "fields": [{"name": "cpu_seq", "type": "string"}]}

    (reason,) = reasons(Other(None), message(TRANSMITS))
    assert "schema 1 has no " in reason


def test_a_schema_that_was_rejected_for_a_while_is_used_afterwards() -> None:
    class Forgetful(Decoder):
        asked = 0

        def schema(self, schema_id: int) -> Any:
            self.asked += 1
            if self.asked < 3:
                raise UndecodableError("too many unknown schema ids")
            return super().schema(schema_id)

    decoder = Forgetful(None)
    for _ in range(2):
        assert reasons(decoder, message(TRANSMITS)) == ["too many unknown schema ids"]
    assert reasons(decoder, message(TRANSMITS)) == []


def read(cluster: Cluster, **settings: Any) -> list[TopicReport]:
    defaults: dict[str, Any] = {"registry": None, "host": None, "since": None, "client_settings": {}}
    topics = settings.pop("topics", TOPICS)
    return verify(cluster.brokers, topics, **{**defaults, **settings})


def put(cluster: Cluster, topic: str, **fields: Any) -> None:
    stream = next(each for each in STREAMS if topic == each.topic)
    cluster.put(topic, message(stream, **{"host": "h", "boot_id": "b", "cpu": 0, **fields}))


def test_topics_are_read_to_their_end_and_reported(cluster: Cluster) -> None:
    for number in (1, 2, 2, 5):
        put(cluster, TRANSMITS.topic, cpu_seq=number, ts_ns=number * 1_000_000)
    cluster.put(TRANSMITS.topic, b"not avro")
    put(cluster, RETRANSMITS.topic, cpu_seq=1, ts_ns=1)
    put(cluster, FLOWS.topic, cpu_seq=1, ts_ns=1)
    reports = read(cluster)
    assert fault_summary(reports) == "tcp_transmit: missing 2, undecodable 1"
    told = json.loads(show(reports, as_json=True))
    assert list(told) == TOPICS
    assert (told["tcp_transmit"]["messages"], told["tcp_transmit"]["undecodable"]) == (5, 1)
    assert told["tcp_transmit"]["boots"] == [
        {"host": "h", "boot_id": "b", "first_ns": 1_000_000, "last_ns": 5_000_000, "events": 3, "duplicates": 1,
         "gaps": 1, "missing": 2, "perhaps_deleted": 0, "restarts": 0, "out_of_order": 0, "first_numbers": {}}
    ]  # fmt: skip
    lines = show(reports, as_json=False).splitlines()
    assert lines[0] == (
        "tcp_transmit host=h boot=b first=1970-01-01T00:00:00.001Z last=1970-01-01T00:00:00.005Z "
        "events=3 duplicates=1 gaps=1 missing=2 restarts=0 out_of_order=0"
    )
    assert lines[1].endswith(" messages=5 undecodable=1 missing=2")
    assert lines[-1].endswith(" messages=1 undecodable=0 complete")


def test_on_a_terminal_lines_are_wrapped_between_fields(cluster: Cluster) -> None:
    put(cluster, TRANSMITS.topic, cpu_seq=1, ts_ns=1, host="web-" + "x" * 100)
    reports = read(cluster, topics=[TRANSMITS.topic])
    shown = show(reports, as_json=False, width=80).splitlines()
    assert [len(line) for line in shown if len(line) > 80] == [len("  host=web-") + 100]
    assert " ".join(map(str.strip, shown)) == " ".join(show(reports, as_json=False).splitlines())
    assert [line.startswith("  ") for line in shown].count(False) == 2, "a boot and the topic"


def test_order_is_of_the_events_own_flow_whatever_their_key(cluster: Cluster) -> None:
    for number, (sport, ts_ns) in enumerate([(1, 100), (2, 50), (1, 99), (2, 60)], 1):
        put(cluster, TRANSMITS.topic, cpu_seq=number, ts_ns=ts_ns, sport=sport)
    assert fault_summary(read(cluster, topics=[TRANSMITS.topic])) == "tcp_transmit: out_of_order 1"


def test_messages_after_the_start_are_not_read(cluster: Cluster) -> None:
    cluster.put_events(TRANSMITS, range(7))
    reader = TopicReader(cluster.brokers, [TRANSMITS.topic], {})
    try:
        cluster.put_events(TRANSMITS, range(20))
        assert sum(len(messages) for batch in reader.batches() for messages in batch.values()) == 7
    finally:
        reader.close()


def test_one_host_can_be_chosen(cluster: Cluster) -> None:
    for host, numbers in {"h": (1, 2), "g": (1, 3)}.items():
        for number in numbers:
            put(cluster, TRANSMITS.topic, cpu_seq=number, host=host)
    put(cluster, RETRANSMITS.topic, cpu_seq=1)
    put(cluster, FLOWS.topic, cpu_seq=1)
    assert fault_summary(read(cluster, host="h")) is None
    assert read(cluster, host="h")[0].other_hosts == 2
    assert fault_summary(read(cluster, host="g")) == "tcp_transmit: missing 1"


def test_a_missing_topic_is_unavailable(cluster: Cluster) -> None:
    with pytest.raises(UnavailableError, match="topic nowhere: "):
        read(cluster, topics=["nowhere"])


def test_a_setting_that_the_client_does_not_know_is_a_configuration_error(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.setting"):
        read(cluster, client_settings={"no.such.setting": "1"})


@pytest.mark.slow
def test_a_broker_that_is_down_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # A port on which nobody listens.
        brokers = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=brokers):
            verify(brokers, TOPICS, registry=None, host=None, since=None, client_settings={})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "verify needs --brokers"),
        (["--brokers", "127.0.0.1:1", "--since-offset", "end"], "expected a number or 'beginning', found 'end'"),
    ],
)
def test_a_usage_error_is_64(arguments: list[str], text: str) -> None:
    done = rebpf("verify", *arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert text in done.stderr


def test_a_host_without_events_is_not_complete(cluster: Cluster) -> None:
    for number, stream in enumerate(STREAMS, 1):
        cluster.put_events(stream, [number])
    done = rebpf("verify", "--brokers", cluster.brokers, "--host", "web-71")
    assert done.returncode == UnavailableError.exit_code
    assert done.stderr == "rebpf: no events of host web-71: run it without --host to see the hosts\n"


@pytest.mark.slow
def test_a_port_of_http_is_named_as_such() -> None:
    def answer() -> None:
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                with client:
                    client.recv(1)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=answer, daemon=True).start()
        done = rebpf("verify", "--brokers", f"127.0.0.1:{server.getsockname()[1]}")
        server.shutdown(socket.SHUT_RDWR)
    assert done.returncode == UnavailableError.exit_code
    assert done.stderr.splitlines()[-1].endswith("; this port speaks HTTP, not Kafka: check kafka.brokers")
