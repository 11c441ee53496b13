"""Each command with the rights that docs/operations.md names, and without one of them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation, ResourceType

from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from tests.support.events import Sent, messages
from tests.support.flows import Flow, values
from tests.support.rebpf import rebpf
from tests.support.servers.secure import SCRAM, USERS, SecureKafka

pytestmark = pytest.mark.real_kafka

READER = USERS[SCRAM]
STREAMS = (TRANSMITS, RETRANSMITS, FLOWS)
READ, DESCRIBE, WRITE, CREATE = AclOperation.READ, AclOperation.DESCRIBE, AclOperation.WRITE, AclOperation.CREATE
COMMANDS = {
    "tail": ("--from-beginning", "-n", 3),
    "verify": (),
    "top": ("--once",),
    "report": ("-o", "report.html"),
    "export": ("-o", "events"),
}
ALERT = """
[alert]
listen = ""
group = "alerts"
[[alert.rules]]
name = "loss"
[[alert.rules]]
name = "many"
measure = "count"
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(secure: SecureKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command as the reader; return its exit code, output and last line of the log."""
    monkeypatch.chdir(tmp_path)
    secrets = "".join(f'"{name}" = "{value}"\n' for name, value in secure.sasl(SCRAM).items())

    def run(prefix: str, command: str, *arguments: object, more: str = "") -> tuple[int, str, str]:
        path = tmp_path / "rebpf.toml"
        path.write_text(f'kafka.topic_prefix = "{prefix}"\n[kafka.settings]\n{secrets}{more}')
        done = rebpf(command, "--config", path, "--brokers", secure.address("SASL_SSL"), *arguments)
        return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]

    return run


def may_not_read(topic: str) -> str:
    grant = f"kafka-acls.sh --add --operation READ --operation DESCRIBE --topic {topic} --allow-principal User:NAME"
    return f"rebpf: topic {topic}: this user may not read it: {grant}"


def fill(secure: SecureKafka, prefix: str) -> None:
    """Create the topics of events, with an event in each."""
    now_ms = time.time_ns() // 1_000_000
    sent = [Sent(each, "web-1", 1, now_ms, "192.0.2.1", 443, 1, cause="rto") for each in (TRANSMITS, RETRANSMITS)]
    ids = {prefix + each.topic: each.fixed_schema_id for each in STREAMS}
    made = messages(sent, ids, prefix)
    made.append((f"{prefix}tcp_flow", b"web-1", values([Flow("web-1", 7, now_ms, now_ms - 1000, 10)])[0]))
    client = Producer({"bootstrap.servers": secure.bootstrap})
    for topic, key, value in made:
        secure.create_topic(topic)
        client.produce(topic, value, key)
    assert client.flush(30) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_read_and_describe_on_the_topics_is_all_that_a_reader_needs(secure, run: Run, command: str) -> None:
    prefix = f"{command}."
    fill(secure, prefix)
    arguments = COMMANDS[command]
    topics = [prefix + stream.topic for stream in STREAMS if not (command == "top" and stream is TRANSMITS)]

    for topic in topics:
        code, _, error = run(prefix, command, *arguments)
        assert (code, error) == (77, may_not_read(topic))
        secure.grant(READER, topic, DESCRIBE)
        if topic == topics[-1]:
            for each in topics[:-1]:
                secure.grant(READER, each, READ)
            code, _, error = run(prefix, command, *arguments)
            assert (code, error) == (77, may_not_read(topic)), "DESCRIBE alone is not enough"
            secure.grant(READER, topic, READ)

    code, output, error = run(prefix, command, *arguments)
    assert code == 0, error
    assert command == "report" or "192.0.2.1" in output or "events=1" in output


def test_alert_names_each_right_that_it_lacks(secure, run: Run) -> None:
    topics = [f"alert.{name}" for name in ("tcp_flow", "tcp_retransmit", "rebpf_agent", "tcp_alerts")]
    for topic in topics:
        secure.create_topic(topic, 1)
    granted: list[str] = []

    def lacks() -> str:
        code, _, error = run("alert.", "alert", more=ALERT)
        assert code == 77
        return error

    for topic in topics:
        assert lacks() == may_not_read(topic)
        secure.grant(READER, topic, DESCRIBE)
    writes = "kafka-acls.sh --add --producer --topic alert.tcp_alerts --allow-principal User:NAME"
    assert lacks() == f"rebpf: topic alert.tcp_alerts: this user may not write to it: {writes}"
    secure.grant(READER, "alert.tcp_alerts", WRITE)
    joins = "kafka-acls.sh --add --operation READ --group alerts --allow-principal User:NAME"
    assert lacks() == f"rebpf: group alerts: this user may not join it: {joins}"
    secure.grant(READER, "alerts", READ, kind=ResourceType.GROUP)
    while lacking := [topic for topic in topics if topic not in granted]:
        error = lacks()
        (named,) = [topic for topic in lacking if error == may_not_read(topic)]
        secure.grant(READER, named, READ)
        granted.append(named)

    code, _, error = run("alert.", "alert", "--duration", 3, more=ALERT)
    assert (code, error.partition(" INFO ")[2].partition(" ")[0]) == (0, "stopped")


def test_create_on_the_topics_is_all_that_init_needs(secure, run: Run) -> None:
    topics = [f"init.{name}" for name in ("tcp_transmit", "tcp_retransmit", "tcp_flow", "rebpf_agent", "tcp_alerts")]
    for topic in topics:
        grant = f"kafka-acls.sh --add --operation CREATE --topic {topic} --allow-principal User:NAME"
        code, _, error = run("init.", "init", "--alerts")
        assert (code, error) == (77, f"rebpf: this user may not create topic {topic}: {grant}")
        secure.grant(READER, topic, CREATE)

    code, output, _ = run("init.", "init", "--alerts")
    assert code == 0
    assert "topic init.tcp_alerts: created" in output


def test_describe_is_all_that_init_needs_of_topics_that_exist(secure, run: Run) -> None:
    for name in ("tcp_transmit", "tcp_retransmit", "tcp_flow", "rebpf_agent"):
        secure.create_topic(f"exists.{name}", 1)
        secure.grant(READER, f"exists.{name}", DESCRIBE)

    code, output, _ = run("exists.", "init")
    assert code == 0
    assert output.count(": exists, unchanged\n") == 4
