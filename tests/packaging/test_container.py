"""The image and docker-compose.yml, built and run by a real engine if one can be started.

The engine is without a bridge, and others' images may be out of reach. So Compose starts the services that are this
project's, on the host's network, against a real Kafka, registry and Alertmanager there. Grafana does not run: that its
files fit together is all that is shown of it.
"""

import configparser
import contextlib
import json
import os
import shlex
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from fastavro import parse_schema

from producer.events import CAUSES
from producer.paths import SCHEMAS
from tests.support.compose import CONTAINER, ROOT, Servers
from tests.support.rebpf import wait_until
from tests.support.servers import docker
from tests.support.servers.alertmanager import AlertmanagerServer
from tests.support.servers.alertmanager import package as alertmanager_package
from tests.support.servers.consume import decode, kcat_messages
from tests.support.servers.docker import DockerEngine
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import LOG_TAIL_LINES
from tests.support.servers.registry import SchemaRegistry

SUITE, BASE = "trixie", "debian:trixie-slim"
OURS = ("init", "producer", "alert", "traffic")
HTTP_PORT = 9465
TRAFFIC = ("10.111.", "fd6f:")
"""Prefix of the addresses of the service `traffic`, as in the demo."""
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    """A running engine with the Dockerfile's base image."""
    if reason := docker.refusal():
        pytest.skip(f"NO DOCKER ENGINE: {reason}")
    try:
        base = docker.base(SUITE)
        docker.programs()
    except LookupError as error:
        pytest.skip(f"NO DOCKER ENGINE: {error}")
    # A short path, deleted at the end: pytest keeps its folders for a while, and this one has gigabytes.
    with tempfile.TemporaryDirectory(prefix="rebpf-docker-") as name, contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(DockerEngine(Path(name)))
        except RuntimeError as error:
            pytest.skip(f"NO DOCKER ENGINE: {error}")
        server.docker("import", str(base), "debootstrap")
        server.docker("build", "--tag", BASE, str(this_machines_ways(Path(name, "ways"))))
        yield server


def this_machines_ways(folder: Path) -> Path:
    """Create the context of an image in which apt and pip reach the same servers as here."""
    kept = ("Acquire::http", "Acquire::https", "Acquire::Check-")
    settings = run("apt-config", "dump").splitlines()
    write(folder / "etc/apt/apt.conf.d/99host", "".join(f"{each}\n" for each in settings if each.startswith(kept)))
    pip = configparser.ConfigParser(interpolation=None)
    pip["global"] = {}
    for line in run(".venv/bin/python", "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        pip["global"][name.rpartition(".")[2]] = shlex.split(value)[0]
    pip["global"].pop("find-links", None)
    if certificates := pip["global"].get("cert"):
        write(folder / "etc/pip-certificates.crt", Path(certificates).read_text())
        pip["global"]["cert"] = "/etc/pip-certificates.crt"
    with (folder / "etc/pip.conf").open("w") as file:
        pip.write(file)
    write(folder / "Dockerfile", "FROM debootstrap\nCOPY etc /etc\n")
    return folder


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def image(engine: DockerEngine) -> str:
    """The image, built by the Dockerfile without caches."""
    proxies = [word for name in PROXIES if name in os.environ for word in ("--build-arg", name)]
    dockerfile = ("--file", str(CONTAINER / "Dockerfile"))
    engine.docker("build", "--network", "host", *proxies, *dockerfile, "--tag", "rebpf", str(ROOT))
    return "rebpf"


@pytest.mark.extended
def test_the_image_runs_without_rights(engine: DockerEngine, image: str) -> None:
    (facts,) = json.loads(engine.docker("image", "inspect", image))
    (base,) = json.loads(engine.docker("image", "inspect", BASE))
    print(f"image: user {facts['Config']['User']}, {(facts['Size'] - base['Size']) >> 20} MiB over {BASE}'s")
    assert facts["Config"]["User"] == "rebpf"
    command = ("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert engine.docker(*command, "version") == f"rebpf {project['version']}\n"
    # Only the requirements of capture are missing.
    answer = json.loads(engine.docker(*command, "check", "--local", "--json", status=77))
    findings = {finding["subject"]: finding for finding in answer}
    assert [name for name, finding in findings.items() if not finding["ok"]] == ["capabilities"]
    assert findings["capabilities"]["exit_code"] == 77
    assert findings["bcc"]["text"].endswith("in /usr/bin/python3")


@pytest.mark.extended
def test_nothing_that_builds_is_left_in_the_image(engine: DockerEngine, image: str) -> None:
    left = (
        "command -v pip pip3 gcc cc make git",
        "ls -d /src /dist 2>/dev/null",
        "find /var/lib/apt/lists /var/cache/apt -type f -size +0",
    )
    command = ("run", "--rm", "--network", "none", "--user", "root", "--entrypoint", "sh", image, "-c")
    assert engine.docker(*command, f"{'; '.join(left)}; true") == ""


@dataclass(frozen=True)
class Live:
    """The running Compose services of this project, and the servers that they use."""

    engine: DockerEngine
    command: tuple[str, ...]
    kafka: KafkaServer
    alertmanager: AlertmanagerServer

    def compose(self, *words: str) -> str:
        return self.engine.docker(*self.command, *words)


@pytest.fixture(scope="module")
def live(
    engine: DockerEngine, image: str, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", HTTP_PORT)) == 0:
            pytest.skip(f"NO CAPTURE IN A CONTAINER: another process has port {HTTP_PORT}")
    try:
        alertmanager_package()
    except LookupError as error:
        pytest.skip(f"NO ALERTMANAGER: {error}")
    folder = tmp_path_factory.mktemp("live")
    files = ("--file", str(ROOT / "docker-compose.yml"), "--file", str(folder / "override.yml"))
    command = ("compose", "--ansi", "never", "--project-directory", str(ROOT), *files)
    with AlertmanagerServer(folder / "alertmanager") as alertmanager:
        (folder / "override.yml").write_text(override(configuration(folder, *servers, alertmanager)))
        running = Live(engine, command, servers[0], alertmanager)
        try:
            running.compose("up", "--no-build", "--detach", *OURS)
            yield running
        finally:
            print("\n".join(running.compose("logs").splitlines()[-LOG_TAIL_LINES:]))
            running.compose("down", "--volumes", "--timeout", "60")


def configuration(folder: Path, kafka: KafkaServer, registry: SchemaRegistry, alertmanager: AlertmanagerServer) -> Path:
    """Write Compose's configuration with the servers that run here, and a short window."""
    text = (CONTAINER / "rebpf.toml").read_text()
    changes = {
        "kafka:19092": kafka.bootstrap,
        "http://registry:8080/apis/ccompat/v7": registry.url,
        "http://alertmanager:9093": alertmanager.url,
        "stdout = true": "stdout = true\nlateness_s = 1.0",
        "window_s = 20.0": "window_s = 5.0",
    }
    for said, here in changes.items():
        assert said in text
        text = text.replace(said, here)
    (folder / "rebpf.toml").write_text(text)
    return folder / "rebpf.toml"


def override(config_file: Path) -> str:
    """Overrides for docker-compose.yml: services on the host's network, with servers that already run there."""
    mounted = f"{config_file}:/etc/rebpf/rebpf.toml:ro"
    services: dict[str, Any] = {name: {"network_mode": "host", "volumes": [mounted]} for name in OURS}
    services["traffic"] = {"network_mode": "none"}
    return yaml.safe_dump({"services": services}).replace("init:\n", "init:\n    depends_on: !reset {}\n", 1)


@pytest.mark.extended
def test_the_producer_captures_as_a_user_without_rights(live: Live) -> None:
    status = live.compose("exec", "--user", "root", "producer", "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert "0" not in fields["Uid"].split()
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
    answer = json.loads(live.compose("exec", "--user", "rebpf", "producer", "rebpf", "status", "--json"))
    assert (answer["pid"], answer["host"]) == (1, socket.gethostname())


@pytest.mark.extended
def test_retransmits_of_the_traffic_arrive(live: Live) -> None:
    event = wait_until("a retransmit of the traffic", lambda: retransmit(live.kafka))
    assert event["host"] == socket.gethostname()
    assert event["cause"] in CAUSES


@pytest.mark.extended
def test_alertmanager_gets_an_alert_about_the_traffic(live: Live) -> None:
    def told() -> list[dict[str, str]]:
        labels = [alert["labels"] for alert in live.alertmanager.alerts()]
        return [each for each in labels if each["peer"].startswith(TRAFFIC)]

    alerts = wait_until("an alert", told)
    assert {labels["alertname"] for labels in alerts} == {"retransmits"}
    assert f"FIRING peer {alerts[0]['peer']}" in live.compose("logs", "alert")


def retransmit(kafka: KafkaServer) -> dict[str, Any] | None:
    """Return a retransmission of the service `traffic`, identified by the demo's addresses."""
    schema = cast("dict[str, Any]", parse_schema(json.loads((SCHEMAS / "tcp_retransmit.avsc").read_text())))
    messages = kcat_messages(kafka.bootstrap, "tcp_retransmit")
    events = (decode(message.value or b"", schema)[1] for message in messages)
    return next((event for event in events if event["saddr"].startswith(TRAFFIC)), None)
