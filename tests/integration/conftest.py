"""One real Kafka and one real registry for the whole session, and configurations for them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

from tests.support.rebpf import COMPILED
from tests.support.servers import fetch
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.registry import SchemaRegistry
from tests.support.servers.secure import SecureKafka


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile the programs once for all producers, except those of tests that say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(COMPILED, str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session")
def servers_present() -> None:
    """Skip if real servers cannot run; for tests that start their own."""
    if absent := fetch.missing():
        packages = "default-jre-headless maven kcat openssl util-linux"
        pytest.skip(f"NO REAL KAFKA: {', '.join(absent)} not installed (apt-get install {packages})")


@pytest.fixture(scope="session")
def kafka(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A running broker, shared: a test names its topics after itself and does not stop the broker."""
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture(scope="session")
def secure(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    """A running broker with TLS, SASL and ACLs, shared: a test names its topics after itself, and undoes all else."""
    with SecureKafka(tmp_path_factory.mktemp("secure")) as server:
        yield server


@pytest.fixture(scope="session")
def registry(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchemaRegistry]:
    """A running registry, shared: a test names its subjects after itself and does not stop the registry.

    The first ids are taken, so that no schema gets a fixed id.
    """
    with SchemaRegistry(tmp_path_factory.mktemp("registry")) as server:
        with SchemaRegistryClient({"url": server.url, "timeout": 10}) as client:
            for name in "abcd":
                text = json.dumps({"type": "record", "name": name, "fields": []})
                client.register_schema("other-value", Schema(text))
        yield server


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """Write a configuration with a prefix of topics, and return its path."""

    def write(prefix: str, more: str = "") -> str:
        path = tmp_path / "rebpf.toml"
        path.write_text(f'kafka.topic_prefix = "{prefix}"\n{more}')
        return str(path)

    return write
