"""`rebpf run` with a real schema registry, one that is down, and one that never answers."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.error import SchemaRegistryError

from producer.commands.init import register_schemas
from producer.config.load import Config, Kafka, Registry
from producer.errors import SchemaError
from producer.registry.published import schema_ids
from tests.support import procfs, topics
from tests.support.rebpf import Run, rebpf
from tests.support.servers.process import free_port
from tests.support.topics import SCHEMAS, TRANSMIT
from tests.support.traffic import Echo, exchange

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]


@pytest.fixture
def client(registry) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": registry.url, "timeout": 10}) as client:
        yield client


def config(prefix: str, registry: str, more: str = "") -> str:
    return f'kafka.topic_prefix = "{prefix}"\nregistry.url = "{registry}"\nregistry.timeout_s = 1\n{more}\n'


def ids(client: SchemaRegistryClient, prefix: str) -> dict[str, int]:
    return {topic: client.get_latest_version(f"{prefix}{topic}-value").schema_id for topic in topics.FIXED_IDS}


def test_schemas_are_looked_up_and_init_registers_them(kafka, client, registry, tmp_path):
    text = config("looked.", registry.url)
    with Run(tmp_path, "--brokers", kafka.bootstrap, config=text) as run:
        assert run.wait() == 78
        assert run.log == (
            f"rebpf: registry {registry.url} does not have looked.tcp_transmit-value in this version: "
            "run `rebpf init`\n"
        )
        assert run.output == ""

    done = rebpf("init", "--config", run.config, "--brokers", kafka.bootstrap)
    assert done.returncode == 0, done.stderr
    numbers = ids(client, "looked.")
    assert [f"schema looked.{topic}-value: id {number}, FULL_TRANSITIVE" for topic, number in numbers.items()] == (
        done.stdout.splitlines()[4:7]
    )
    for topic, number in numbers.items():
        assert json.loads(client.get_schema(number).schema_str) == json.loads((SCHEMAS / f"{topic}.avsc").read_text())

    with Echo() as echo, Run(tmp_path, "--brokers", kafka.bootstrap, "--port", echo.port, config=text) as run:
        run.ready()
        port = int(registry.url.split(":")[2].partition("/")[0])
        assert not [each for each in procfs.connections(run.pid) if each.peer[1] == port], "it is no longer needed"
        exchange(echo.port, 3)
        run.finish()
    events = topics.read(kafka.bootstrap, TRANSMIT, "looked.")
    assert {event.schema_id for event in events} == {numbers[TRANSMIT]} != {topics.FIXED_IDS[TRANSMIT]}


def own_config(prefix: str, url: str, tmp_path) -> Config:
    return Config(state_dir=tmp_path, kafka=Kafka(topic_prefix=prefix), registry=Registry(url, timeout_s=1))


def test_a_registry_without_the_heartbeats_schema_costs_the_heartbeats_alone(client, registry, tmp_path, caplog):
    for topic in topics.FIXED_IDS:
        text = json.dumps(json.loads((SCHEMAS / f"{topic}.avsc").read_text()))
        client.register_schema(f"deaf.{topic}-value", Schema(text, "AVRO"))
    numbers = {f"deaf.{topic}": number for topic, number in ids(client, "deaf.").items()}

    assert schema_ids(own_config("deaf.", registry.url, tmp_path)) == numbers
    (record,) = caplog.records
    assert "does not have deaf.rebpf_agent-value" in record.getMessage()
    assert record.getMessage().endswith("not sending to topic deaf.rebpf_agent")

    cache = tmp_path / "schema_ids.json"
    with refusing() as url:
        cache.write_text(cache.read_text().replace(registry.url, url))
        assert schema_ids(own_config("deaf.", url, tmp_path)) == numbers, "nor does a cache without it"


def test_the_heartbeats_schema_is_registered_and_cached_as_the_others_are(client, registry, tmp_path):
    lines = register_schemas(own_config("heard.", registry.url, tmp_path))
    number = client.get_latest_version("heard.rebpf_agent-value").schema_id
    assert lines[3] == f"schema heard.rebpf_agent-value: id {number}, FULL_TRANSITIVE"
    assert schema_ids(own_config("heard.", registry.url, tmp_path))["heard.rebpf_agent"] == number

    cache = tmp_path / "schema_ids.json"
    with refusing() as url:
        cache.write_text(cache.read_text().replace(registry.url, url))
        assert schema_ids(own_config("heard.", url, tmp_path))["heard.rebpf_agent"] == number


def test_run_registers_schemas_if_configured(kafka, client, registry, tmp_path):
    for topic in topics.FIXED_IDS:
        kafka.create_topic(f"registered.{topic}")
    text = config("registered.", registry.url, "registry.register = true")
    with Echo() as echo, Run(tmp_path, "--brokers", kafka.bootstrap, "--port", echo.port, config=text) as run:
        run.ready()
        exchange(echo.port, 3)
        run.finish()

    events = topics.read(kafka.bootstrap, TRANSMIT, "registered.")
    assert {event.schema_id for event in events} == {ids(client, "registered.")[TRANSMIT]}


def test_an_incompatible_schema_is_a_configuration_error(kafka, client, registry, tmp_path):
    other = {
        "type": "record",
        "name": "TcpTransmit",
        "namespace": "rebpf.v1",
        "fields": [{"name": "ts", "type": "string"}],
    }
    subject = "strict.tcp_transmit-value"
    client.register_schema(subject, Schema(json.dumps(other), "AVRO"))
    client.set_compatibility(subject, "FULL_TRANSITIVE")

    with Run(
        tmp_path, "--brokers", kafka.bootstrap, config=config("strict.", registry.url, "registry.register = true")
    ) as run:
        assert run.wait() == 78
        last = run.log.splitlines()[-1]
        assert last.startswith(f"rebpf: registry {registry.url}: {subject} has an incompatible schema: ")


def test_init_takes_no_schema_that_is_incompatible_with_what_is_there(client, registry, tmp_path):
    """Also if somebody else created the subject, without a compatibility level."""
    subject = "taken.tcp_transmit-value"
    client.register_schema(subject, Schema(json.dumps({"type": "record", "name": "Other", "fields": []}), "AVRO"))
    with pytest.raises(SchemaError, match=f"{subject} has an incompatible schema"):
        register_schemas(own_config("taken.", registry.url, tmp_path))
    assert client.get_versions(subject) == [1]


def test_each_schema_is_compatible_both_ways_with_every_released_one(client, registry, tmp_path):
    """As decided by the registry, which then also checks later ones."""
    for path in sorted(SCHEMAS.glob("released/*/*.avsc")):
        prefix = f"since-{path.parent.name}."
        client.register_schema(f"{prefix}{path.stem}-value", Schema(path.read_text(), "AVRO"))
    prefixes = [f"since-{folder.name}." for folder in SCHEMAS.glob("released/*")]
    assert prefixes
    for prefix in prefixes:
        lines = register_schemas(own_config(prefix, registry.url, tmp_path), alerts=True)
        assert len(lines) == 5
        for topic in (*topics.FIXED_IDS, "rebpf_agent", "tcp_alerts"):
            subject = f"{prefix}{topic}-value"
            assert client.get_compatibility(subject) == "FULL_TRANSITIVE"
            published = json.loads((SCHEMAS / f"{topic}.avsc").read_text())
            for changed in (without_a_field(published), with_a_field_that_has_no_default(published)):
                with pytest.raises(SchemaRegistryError) as refused:
                    client.register_schema(subject, Schema(json.dumps(changed), "AVRO"))
                assert refused.value.http_status_code == 409


def without_a_field(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "fields": schema["fields"][1:]}


def with_a_field_that_has_no_default(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "fields": [*schema["fields"], {"name": "new", "type": "long"}]}


@contextmanager
def refusing() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def black_hole() -> Iterator[str]:
    """A registry that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("registry_of", [refusing, black_hole])
def test_without_an_answer_and_without_a_cache_it_does_not_start(kafka, tmp_path, registry_of):
    with registry_of() as url, Run(tmp_path, "--brokers", kafka.bootstrap, config=config("none.", url)) as run:
        assert run.wait() == 69
        assert run.log.startswith(f"rebpf: registry {url} does not answer: ")
        assert len(run.log.splitlines()) == 1


@pytest.mark.parametrize("registry_of", [refusing, black_hole])
def test_without_an_answer_earlier_ids_are_used(kafka, registry, tmp_path, registry_of):
    """For the same registry, subject and schema: the cache of a real run, with its address changed."""
    prefix = f"cached-{registry_of.__name__}."
    text = config(prefix, registry.url, "registry.register = true")
    for topic in topics.FIXED_IDS:
        kafka.create_topic(prefix + topic)
    with Run(tmp_path, "--brokers", kafka.bootstrap, "--duration", 0.1, config=text) as run:
        run.finish(None)
    cache = run.state_dir / "schema_ids.json"
    numbers = json.loads(cache.read_text())

    with registry_of() as url, Echo() as echo:
        cache.write_text(cache.read_text().replace(registry.url, url))
        arguments = ["--brokers", kafka.bootstrap, "--port", echo.port]
        with Run(tmp_path, *arguments, config=config(prefix, url)) as run:
            run.ready()
            exchange(echo.port, 3)
            run.finish()
            assert f"WARNING registry: registry {url} does not answer" in run.log

    events = topics.read(kafka.bootstrap, TRANSMIT, prefix)
    (expected,) = [number for key, number in numbers.items() if f" {prefix}tcp_transmit-value " in key]
    assert {event.schema_id for event in events} == {expected}


def test_a_cache_of_another_schema_is_not_used(kafka, tmp_path):
    with refusing() as url, Run(tmp_path, "--brokers", kafka.bootstrap, config=config("none.", url)) as run:
        run.state_dir.mkdir(exist_ok=True)
        keys = [f"{url} none.{topic}-value {'0' * 64}" for topic in topics.FIXED_IDS]
        (run.state_dir / "schema_ids.json").write_text(json.dumps(dict.fromkeys(keys, 7)))
        assert run.wait() == 69
