"""The Kubernetes manifests: valid for three versions, and in agreement with the image and the producer."""

import copy
import json
import os
import re
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from producer import __version__
from producer.cli.main import run
from producer.commands.check_settings import settings_offline
from producer.config.effective import AT_RELOAD
from producer.config.load import load
from producer.health import endpoint

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
BASE, POD_NAMES, POD_MONITOR = (
    KUBERNETES / each for each in ("base", "components/pod-names", "components/pod-monitor")
)
VERSIONS = ("1.29", "1.33", "1.37")
CUSTOM = ("Kustomization", "Component", "PodMonitor")
"""Kinds that are not Kubernetes' own."""
Manifest = dict[str, Any]


def manifests(*folders: Path) -> list[Manifest]:
    """Return the manifests that the kustomizations list, with a strategic merge of their patches."""
    found: list[Manifest] = []
    for folder in folders:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        for name in kustomization["resources"]:
            found += yaml.safe_load_all((folder / name).read_text())
        for patch in kustomization.get("patches", ()):
            (target,) = (each for each in found if each["kind"] == patch["target"]["kind"])
            merge(target, yaml.safe_load((folder / patch["path"]).read_text()))
    return found


def merge(target: Any, patch: Any) -> None:
    """Merge a patch as kustomize does: lists of named items by name."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        elif isinstance(value, list) and key == "containers":
            by_name = {each["name"]: each for each in target[key]}
            for each in value:
                merge(by_name[each["name"]], each)
        else:
            target[key] = value


def daemon_set(*folders: Path) -> Manifest:
    (found,) = (each for each in manifests(BASE, *folders) if each["kind"] == "DaemonSet")
    return found


def pod(*folders: Path) -> Any:
    return daemon_set(*folders)["spec"]["template"]["spec"]


def container(*folders: Path) -> Any:
    (found,) = pod(*folders)["containers"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_each_manifest_is_valid(version: str) -> None:
    checked = [each for each in manifests(BASE, POD_NAMES, POD_MONITOR) if each["kind"] not in CUSTOM]
    assert {each["kind"] for each in checked} == {
        "Namespace", "ServiceAccount", "PriorityClass", "DaemonSet", "ClusterRole", "ClusterRoleBinding",
    }  # fmt: skip
    for each in checked:
        assert kubernetes_validate.validate(each, version, strict=True) == version


def _wrong() -> Iterator[tuple[str, Callable[[Any], object]]]:
    yield "unknown key", lambda spec: spec.update(hostNetworks=True)
    yield "unknown key of a probe", lambda spec: spec["containers"][0]["livenessProbe"].update(period=1)
    yield "type", lambda spec: spec["containers"][0]["ports"][0].update(containerPort="metrics")
    yield "missing name", lambda spec: spec["containers"][0].pop("name")


@pytest.mark.parametrize(("what", "change"), list(_wrong()))
@pytest.mark.parametrize("version", VERSIONS)
def test_the_checker_refuses_a_wrong_manifest(version: str, what: str, change: Callable[[Any], object]) -> None:
    wrong = copy.deepcopy(daemon_set())
    change(wrong["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_each_file_is_listed() -> None:
    listed = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        names = [*kustomization["resources"], *(each["path"] for each in kustomization.get("patches", ()))]
        names += [name for each in kustomization.get("configMapGenerator", ()) for name in each["files"]]
        listed |= {path, *(path.parent / name for name in names)}
    assert listed == {path for path in KUBERNETES.rglob("*") if path.is_file()}


def test_kustomize_renders_the_same(tmp_path: Path) -> None:
    """Only where kubectl is installed; the other tests merge the patch themselves."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("NO KUSTOMIZE: kubectl is not installed")
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [kubernetes/base]\n"
        "components: [kubernetes/components/pod-names, kubernetes/components/pod-monitor]\n"
    )
    done = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    config = rendered.pop(("ConfigMap", "rebpf"))
    assert config["data"] == {"rebpf.toml": (BASE / "rebpf.toml").read_text()}
    ours = {(each["kind"], each["metadata"]["name"]): each for each in manifests(BASE, POD_NAMES, POD_MONITOR)}
    for each in ours.values():
        if each["kind"] in ("DaemonSet", "ServiceAccount"):
            each["metadata"]["namespace"] = "rebpf"
    assert rendered == ours


def test_the_container_has_the_capabilities_of_the_entry_point_and_no_others() -> None:
    script = (ROOT / "deploy/container/entrypoint").read_text()
    (wanted,) = re.findall(r"^wanted=-all,(.*)$", script, re.MULTILINE)
    needed = {each.removeprefix("+").upper() for each in wanted.split(",")}
    security = container()["securityContext"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert {*security["capabilities"]["add"]} == needed | {"SETUID", "SETGID"}, "to switch to the user"
    assert (security["privileged"], security["allowPrivilegeEscalation"]) == (False, False)
    for each in (*pod()["containers"], *pod()["initContainers"]):
        assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert each["image"] == f"rebpf:{__version__}"


def test_the_configuration_is_valid_and_reloaded(tmp_path: Path) -> None:
    config = load(BASE / "rebpf.toml")
    assert [each.exit_code for each in settings_offline(config, BASE / "rebpf.toml")] == [0]
    assert config.reload_when_changed
    assert "reload_when_changed" in AT_RELOAD
    arguments = container()["args"]
    assert arguments[:1] == ["run"]
    folder = Path(arguments[arguments.index("--config") + 1]).parent
    mounts = {each["mountPath"]: each for each in container()["volumeMounts"]}
    assert mounts.keys() >= {str(folder), str(folder / "conf.d"), str(config.state_dir)}
    assert not any("subPath" in each for each in mounts.values()), "the kubelet does not update those"
    assert tomllib.loads((BASE / "rebpf.toml").read_text())["kafka"].keys() == {"brokers"}


def test_probes_and_prometheus_reach_the_endpoint() -> None:
    config = load(BASE / "rebpf.toml")
    (port,) = container()["ports"]
    assert config.metrics.listen == f"0.0.0.0:{port['containerPort']}"
    served = Path(endpoint.__file__).read_text()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        request = container()[probe]["httpGet"]
        assert request["port"] == port["name"]
        assert f'"{request["path"]}"' in served
    (monitor,) = (each for each in manifests(POD_MONITOR) if each["kind"] == "PodMonitor")
    (scraped,) = monitor["spec"]["podMetricsEndpoints"]
    assert scraped["port"] == port["name"]
    labels = daemon_set()["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"] == daemon_set()["spec"]["selector"] == {"matchLabels": labels}
    assert labels[monitor["spec"]["jobLabel"]] == "rebpf", "the job that the alerts expect"


@pytest.mark.parametrize("status", [200, 503])
def test_the_image_asks_for_its_health_without_a_proxy(status: int) -> None:
    """Docker sets these variables in each container if its client has a proxy."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

    (command,) = re.findall(r"HEALTHCHECK .*\n\tCMD (.*)", (ROOT / "deploy/container/Dockerfile").read_text())
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ask = [part.replace("9465", str(server.server_port)) for part in json.loads(command)]
        done = subprocess.run(ask, env={**os.environ, **proxies}, capture_output=True)
        server.shutdown()
    assert (done.returncode, done.stderr) == (0 if status == 200 else 1, b"")


def test_a_stop_has_time_to_deliver() -> None:
    assert pod()["terminationGracePeriodSeconds"] > load(BASE / "rebpf.toml").kafka.stop_timeout_s + 5


def test_each_variable_is_an_option_of_run() -> None:
    names = {each["name"] for each in container(POD_NAMES)["env"]}
    assert names - {"NODE_NAME"} <= {each.envvar for each in run.params}
    assert "env" not in container()
    assert pod()["enableServiceLinks"] is False, "of a service named rebpf, they would be options"
    assert (pod()["automountServiceAccountToken"], pod(POD_NAMES)["automountServiceAccountToken"]) == (False, True)
