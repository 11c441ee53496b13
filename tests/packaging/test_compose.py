"""docker-compose.yml: what it names exists, fits together, and is taken by the programs that read it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from confluent_kafka.admin import AdminClient, ConfigResource

from producer.config import load
from tests.support.compose import CONTAINER, ROOT, Servers, kafka_settings, mounts
from tests.support.servers import docker, prometheus
from tests.support.servers.alertmanager import package as alertmanager_package

GRAFANA = ROOT / "deploy/grafana"
DASHBOARD = json.loads((GRAFANA / "rebpf.json").read_text())

HTTP_PORT = 9465


def test_compose_finds_what_it_mounts_and_builds(composed: dict[str, Any]) -> None:
    services = composed["services"].values()
    sources = [path for service in services for path in mounts(service).values()]
    assert len(set(sources)) > 5
    assert [path for path in sources if not path.exists()] == []
    for service in services:
        if build := service.get("build"):
            assert Path(build["context"], build["dockerfile"]).is_file()


def test_third_party_images_have_a_version(composed: dict[str, Any]) -> None:
    others = [service["image"] for service in composed["services"].values() if "build" not in service]
    assert len(others) == 5
    assert [image for image in others if not re.fullmatch(r"[\w./-]+:v?\d+(\.\d+){2}", image)] == []


def test_third_party_images_can_be_pulled(composed: dict[str, Any]) -> None:
    images = [service["image"] for service in composed["services"].values() if "build" not in service]
    buildx = docker.programs() / docker.PLUGINS / "docker-buildx"
    for image in images:
        command = [buildx, "imagetools", "inspect", image]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as error:
            reason: str | None = str(error)
        else:
            assert "not found" not in done.stderr, image
            reason = done.stderr.strip() if done.returncode else None
        if reason is not None:
            names = ", ".join(image.rpartition("/")[2] for image in images)
            pytest.skip(f"NO IMAGES OF OTHERS: {names} were neither found nor run: {reason[-200:]}")


def test_nothing_listens_but_on_loopback(composed: dict[str, Any]) -> None:
    ports = [port for service in composed["services"].values() for port in service.get("ports", ())]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_our_services_have_no_more_rights_than_they_take(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        if "build" in service:
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
    granted = {name: set(service.get("cap_add", ())) for name, service in composed["services"].items()}
    assert {name for name, capabilities in granted.items() if capabilities} == {"producer", "traffic"}
    assert granted["producer"] == {"BPF", "PERFMON", "NET_ADMIN", "SETUID", "SETGID"}


def test_the_configuration_names_services_and_ports_that_there_are(composed: dict[str, Any]) -> None:
    services = composed["services"]
    settings = load.load(CONTAINER / "rebpf.toml")
    broker, _, port = str(settings.kafka.brokers).partition(":")
    assert f"INTERNAL://{broker}:{port}" in services[broker]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"INTERNAL://:{port}" in services[broker]["environment"]["KAFKA_LISTENERS"]
    assert settings.registry.url == "http://registry:8080/apis/ccompat/v7"
    assert settings.alert.alertmanager == "http://alertmanager:9093"
    assert settings.metrics.listen == f"0.0.0.0:{HTTP_PORT}"
    (rule,) = settings.rules
    inside = {int(port["target"]) for service in services.values() for port in service.get("ports", ())}
    assert rule.action == "drop"
    assert set(rule.port) == inside | {int(port), HTTP_PORT}


def test_promtool_finds_nothing_wrong_with_what_prometheus_is_given(composed: dict[str, Any], tmp_path: Path) -> None:
    try:
        promtool = prometheus.programs() / "promtool"
    except LookupError as error:
        pytest.skip(f"NO PROMETHEUS: {error}")
    for target, source in mounts(composed["services"]["prometheus"]).items():
        shutil.copy(source, tmp_path / Path(target).name)
    done = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout
    given = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in given["scrape_configs"]}
    assert scraped == {"rebpf": [f"producer:{HTTP_PORT}"]}
    (alertmanager,) = given["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert alertmanager.partition(":")[0] in composed["services"]


def test_amtool_finds_nothing_wrong_with_what_alertmanager_is_given(composed: dict[str, Any]) -> None:
    try:
        amtool = alertmanager_package() / "usr/bin/amtool"
    except LookupError as error:
        pytest.skip(f"NO ALERTMANAGER: {error}")
    (source,) = mounts(composed["services"]["alertmanager"]).values()
    done = subprocess.run([amtool, "check-config", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_is_provisioned_with_what_the_dashboard_asks_for(composed: dict[str, Any]) -> None:
    service = composed["services"]["grafana"]
    there = mounts(service)
    assert there["/etc/grafana/provisioning"] == GRAFANA / "provisioning"
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/rebpf.yml").read_text())["providers"]
    dashboard = f"{provider['options']['path']}/rebpf.json"
    assert there[dashboard] == GRAFANA / "rebpf.json"
    assert service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    # A provisioned dashboard has a uid and no id of some database; its queries go to the variable's choice, which is
    # the default data source where that is of the variable's type.
    assert DASHBOARD["uid"]
    assert DASHBOARD["id"] is None
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["type"] == "datasource"]
    assert (variable["query"], variable["regex"], variable["current"]) == (source["type"], "", {})
    uids = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    assert uids == {f"${{{variable['name']}}}"}
    assert source["isDefault"]
    name, _, port = source["url"].removeprefix("http://").partition(":")
    assert int(port) in [each["target"] for each in composed["services"][name]["ports"]]


def test_kafka_and_the_registry_take_what_compose_gives_them(composed: dict[str, Any], servers: Servers) -> None:
    kafka, registry = servers
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    (answer,) = admin.describe_configs([ConfigResource(ConfigResource.Type.BROKER, str(kafka.node_id))]).values()
    in_force = {name: entry.value for name, entry in answer.result(30).items()}
    settings = kafka_settings(composed)
    assert len(settings) == 7
    assert {name: in_force.get(name) for name in settings} == settings
    (kind, *command) = composed["services"]["registry"]["healthcheck"]["test"]
    assert kind == "CMD"
    script = command.pop().replace("$$", "$").replace("/8080", f"/{urlsplit(registry.url).port}")
    assert subprocess.run([*command, script], timeout=30).returncode == 0
    assert subprocess.run([*command, script.replace("/ready", "/none")], timeout=30).returncode == 1
