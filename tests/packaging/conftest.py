"""Compose's file, and the servers that it asks for."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.compose import ROOT, Servers, kafka_settings
from tests.support.servers import docker, fetch
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.registry import SchemaRegistry


@pytest.fixture(scope="package")
def composed() -> dict[str, Any]:
    """docker-compose.yml as parsed by Compose."""
    if reason := docker.refusal():
        pytest.skip(f"NO COMPOSE: {reason}")
    try:
        command = [str(docker.compose()), "--project-directory", str(ROOT), "config", "--format", "json"]
    except LookupError as error:
        pytest.skip(f"NO COMPOSE: {error}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


@pytest.fixture(scope="package")
def servers(composed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if absent := fetch.missing():
        pytest.skip(f"NO REAL KAFKA: {', '.join(absent)} not installed (scripts/setup --tests installs them)")
    kafka = KafkaServer(tmp_path_factory.mktemp("kafka"), settings=kafka_settings(composed))
    registry = SchemaRegistry(tmp_path_factory.mktemp("registry"))
    with kafka, registry:
        yield kafka, registry
