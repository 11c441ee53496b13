"""The commands and programs of docs/consumers.md read a real capture's events from a real Kafka."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import Producer

from producer.events import FLOWS
from tests.support import topics
from tests.support.flows import Flow, values
from tests.support.rebpf import Run, rebpf, wait_until
from tests.support.servers import fetch
from tests.support.topics import SCHEMAS, TRANSMIT, Event
from tests.support.traffic import Echo, exchange

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "consumers.md").read_text()
TOPIC = f"doc.{TRANSMIT}"


def program(name: str) -> str:
    """Return the program whose first line is a comment with its name."""
    (found,) = (code for code in re.findall(r"```\w+\n(.*?)```", TEXT, re.DOTALL) if code[:60].split()[1] == name)
    return str(found)


def shell(name: str) -> str:
    """Return the command that begins with `name`."""
    (found,) = re.findall(rf"```sh\n({re.escape(name)} .*?)```", TEXT, re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def events(kafka, registry, tmp_path_factory) -> list[Event]:
    folder = tmp_path_factory.mktemp("doc")
    text = f'kafka.topic_prefix = "doc."\nregistry.url = "{registry.url}"\n'
    (folder / "init.toml").write_text(text)
    done = rebpf("init", "--config", folder / "init.toml", "--brokers", kafka.bootstrap)
    assert done.returncode == 0, done.stderr
    with Echo() as echo, Run(folder, "--brokers", kafka.bootstrap, "--port", echo.port, config=text) as run:
        run.ready()
        exchange(echo.port, 7)
        run.finish()
    found = topics.read(kafka.bootstrap, TRANSMIT, "doc.")
    assert len(found) > 7 * 16
    return found


@contextmanager
def running(command: Sequence[object], folder: Path) -> Iterator[Path]:
    """Run a program until the context exits; yield its output file."""
    output = folder / "output"
    with output.open("wb") as out, (folder / "errors").open("wb") as err:
        process = subprocess.Popen([str(each) for each in command], stdout=out, stderr=err)
    try:
        yield output
        assert process.poll() is None, (folder / "errors").read_text()
    finally:
        process.kill()
        process.wait()


def lines(output: Path, count: int) -> list[list[str]]:
    """Wait for this many lines, and return them split into words."""
    text = wait_until(f"{count} lines", lambda: (t := output.read_text()).count("\n") >= count and t)
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "schema"), [("with_registry.py", None), ("with_file.py", SCHEMAS / f"{TRANSMIT}.avsc")]
)
def test_the_python_programs_read_each_event(name, schema, kafka, registry, events, tmp_path):
    (tmp_path / name).write_text(program(name))
    command = [sys.executable, tmp_path / name, kafka.bootstrap, schema or registry.url, TOPIC, f"doc-{name}"]
    with running(command, tmp_path) as output:
        found = lines(output, len(events))
    wanted = ("boot_id", "cpu", "cpu_seq", "saddr", "daddr")
    assert sorted(found) == sorted([str(event.record[each]) for each in wanted] for event in events)


def test_the_java_program_reads_each_key_and_schema_id(kafka, events, tmp_path):
    if not shutil.which("javac"):
        pytest.skip(
            "NO JAVA COMPILER: the program of docs/consumers.md is not run (apt-get install default-jdk-headless)"
        )
    (tmp_path / "Keys.java").write_text(program("Keys.java"))
    command = ["java", "-cp", f"{fetch.kafka()}/*", tmp_path / "Keys.java", kafka.bootstrap, TOPIC, "doc-java"]
    with running(command, tmp_path) as output:
        found = lines(output, len(events))
    assert sorted(found) == sorted(
        [event.message.key.decode(), str(event.schema_id), str(len(event.message.value))] for event in events
    )


def test_the_java_program_decodes_each_value_with_avro_alone(kafka, tmp_path):
    if not shutil.which("javac"):
        pytest.skip(
            "NO JAVA COMPILER: a program of docs/consumers.md is not run (apt-get install default-jdk-headless)"
        )
    kafka.create_topic("doc.values")
    sent = [Flow(f"host-{at}", at, 1_800_000_000_000, None, at, {"rto": at}, error="ETIMEDOUT") for at in range(1, 6)]
    client = Producer({"bootstrap.servers": kafka.bootstrap})
    for value in values(sent):
        client.produce("doc.values", value)
    assert client.flush(30) == 0
    (tmp_path / "Values.java").write_text(program("Values.java"))
    jars = f"{fetch.kafka()}/*:{fetch.avro()}/*"
    schema = SCHEMAS / "tcp_flow.avsc"
    command = ["java", "-cp", jars, tmp_path / "Values.java", kafka.bootstrap, schema, "doc.values", "doc-values"]
    with running(command, tmp_path) as output:
        wait_until("all lines", lambda: output.read_text().count("\n") >= len(sent))
        found = output.read_text().splitlines()
    assert {line.partition(" ")[0] for line in found} == {str(FLOWS.fixed_schema_id)}
    records = [json.loads(line.partition(" ")[2]) for line in found]
    names = ("host", "sk_cookie", "segs_out", "retrans_rto", "start_ns", "error")
    assert sorted(tuple(record[name] for name in names) for record in records) == [
        (flow.host, flow.cookie, flow.segs, flow.causes["rto"], None, "ETIMEDOUT") for flow in sent
    ]


def test_kcat_and_the_console_consumer_show_the_keys(kafka, events, tmp_path):
    # The cache has the jars without the distribution's scripts; this is what the script starts.
    script = tmp_path / "kafka-console-consumer.sh"
    jars = f"{fetch.kafka()}/*"
    script.write_text(f"#!/bin/sh\nexec java -cp '{jars}' org.apache.kafka.tools.consumer.ConsoleConsumer \"$@\"\n")
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "BROKERS": kafka.bootstrap, "TOPIC": TOPIC, "PATH": path}

    def keys(command: str) -> list[str]:
        run = ["sh", "-c", shell(command)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
        return sorted(line.split()[-1] for line in done.stdout.splitlines())

    wanted = sorted(event.message.key.decode() for event in events)
    assert keys("kcat") == wanted
    assert keys("kafka-console-consumer.sh") == wanted
