"""`rebpf export`, `rebpf report` and `rebpf.read` on a real Kafka: a period of topics, also with events sent late."""

import html
import json
import re
import shlex
from pathlib import Path

import pytest
from confluent_kafka import Producer

import rebpf
from producer.events import FLOWS, RETRANSMITS, Stream
from tests.support.analysis import HOSTILE, NOON_NS, SECOND_NS, message, record, scene
from tests.support.rebpf import rebpf as command
from tests.support.servers.kafka import KafkaServer

pytestmark = pytest.mark.real_kafka

HOUR_NS = 3600 * SECOND_NS
PREFIX = "export."


@pytest.fixture(scope="module")
def config(kafka: KafkaServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Topics with the scene at noon, connections an hour before, one event sent an hour late, and a foreign message."""
    early = [record(FLOWS, ts_ns=NOON_NS - HOUR_NS, host="web-0", cpu=9, cpu_seq=1)]
    late = [record(FLOWS, ts_ns=NOON_NS + SECOND_NS, host="web-9", cpu=9, cpu_seq=1, segs_out=7, total_retrans=0)]
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    given = scene()
    # No transmits: that topic does not exist.
    for stream, records, delay_ns in (
        (FLOWS, early, 0),
        (FLOWS, given[FLOWS], 0),
        (FLOWS, late, HOUR_NS),
        (RETRANSMITS, given[RETRANSMITS], 0),
    ):
        topic = PREFIX + stream.topic
        if topic not in producer.list_topics(timeout=30).topics:
            kafka.create_topic(topic, 3, settings={"retention.ms": "-1"})
        for each in records:
            sent_ms = (each["ts_ns"] + delay_ns) // 1_000_000
            producer.produce(topic, message(stream, each), each["host"].encode(), timestamp=sent_ms)
    producer.produce(PREFIX + FLOWS.topic, b"foreign", b"", timestamp=NOON_NS // 1_000_000)
    assert producer.flush(60) == 0
    producer.close()
    path = tmp_path_factory.mktemp("config") / "rebpf.toml"
    path.write_text(f'kafka.brokers = "{kafka.bootstrap}"\nkafka.topic_prefix = "{PREFIX}"\n')
    return path


def hosts(folder: Path, stream: Stream) -> list[str]:
    return sorted({each["host"] for each in rebpf.read(folder, topic=stream.topic, columns=["host"]).to_pylist()})


def test_a_period_is_exported_with_what_was_sent_late(config: Path, tmp_path: Path) -> None:
    period = ("--since", "2026-09-21T11:30Z", "--until", "2026-09-21T13:00Z")
    done = command("export", "--config", config, *period, "-o", tmp_path / "events")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "undecodable messages: 1, the first: not in Confluent's wire format\n"
    written = {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}
    day = "date=2026-09-21/20260921T113000Z-20260921T130000Z.parquet"
    assert written == {
        str(tmp_path / "events/tcp_flow" / day): "events=66",
        str(tmp_path / "events/tcp_retransmit" / day): "events=150",
    }
    found = hosts(tmp_path / "events", FLOWS)
    assert "web-9" in found
    assert "web-0" not in found


def test_the_whole_topic_is_read_in_python(config: Path, kafka: KafkaServer) -> None:
    table = rebpf.read(brokers=kafka.bootstrap, topic="tcp_flow", topic_prefix=PREFIX, columns=["host", "segs_out"])
    assert len(table) == 67
    assert {"web-0", "web-9"} <= set(table["host"].to_pylist())


def test_the_report_of_a_period_has_its_figures(config: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    period = ("--since", "2026-09-21T11:30Z", "--until", "2026-09-21T13:00Z")
    done = command("report", "--config", config, *period, "-o", page, "--filter", "not host web-9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "150 of 60,005 segments were retransmitted: 0.250%."
    text = page.read_text()
    assert "1 message could not be decoded." in text
    assert "only not host web-9" in text
    commands = re.findall(r"rebpf (?:verify|export) .*?(?=  #)", text)
    assert len(commands) == 2
    words = shlex.split(html.unescape(commands[1]))[1:]
    done = command(*(tmp_path / word if word == "events" else word for word in words))
    assert done.returncode == 0, done.stderr
    assert hosts(tmp_path / "events", FLOWS) == [HOSTILE, "web-1", "web-2"]


def test_tail_begins_at_the_given_time(config: Path) -> None:
    """All events are of the past: at the topics' end there is nothing to show."""
    topic = ("--topic", PREFIX + FLOWS.topic, "--config", config, "--json", "-n", 67)
    done = command("tail", *topic, "--from-beginning")
    assert min(json.loads(line)["ts_ns"] for line in done.stdout.splitlines()) == NOON_NS - HOUR_NS
    done = command("tail", *topic[:-1], 66, "--since", "2026-09-21T11:30Z")
    assert min(json.loads(line)["ts_ns"] for line in done.stdout.splitlines()) >= NOON_NS


def test_topics_that_are_not_there_and_wrong_filters_are_one_line(config: Path, tmp_path: Path) -> None:
    done = command("export", "--config", config, "--topic", "tcp_transmit", "-o", tmp_path / "events")
    assert (done.returncode, done.stdout) == (69, "")
    assert re.fullmatch(r"rebpf: no topic export\.tcp_transmit at \S+\n", done.stderr)
    done = command("export", "--config", config, "--filter", "host web-1 andd", "-o", tmp_path / "events")
    assert done.returncode == 64
    assert "^" in done.stderr.splitlines()[-1]
    assert json.dumps(done.stderr).count("Traceback") == 0
    assert not (tmp_path / "events").exists()
