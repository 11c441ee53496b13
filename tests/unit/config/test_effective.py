"""The effective configuration: what it shows and hides, when hosts have the same hash, and what a reload changes."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from producer.config import effective, sources
from producer.config.load import Config, Kubernetes, load

from .test_every_setting import FULL

SECRETS = """
[kafka.settings]
"sasl.password" = "hunter2"
"ssl.key.password" = "hunter2"
"ssl.key.pem" = "hunter2"
"sasl.oauthbearer.client.secret" = "hunter2"
"sasl.oauthbearer.assertion.private.key.pem" = "hunter2"
"sasl.oauthbearer.assertion.private.key.passphrase" = "hunter2"
"sasl.oauthbearer.config" = "hunter2"
"sasl.username" = "rebpf"
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def loaded(path: Path, text: str) -> Config:
    return load(write(path, text))


@pytest.mark.parametrize(
    "text",
    [FULL.replace("hook:80/x", "hook:80"), "", 'host = "größer \U0001f600"\n[[rules]]\nunit = [\'a"b.service\']'],
)
def test_the_printed_configuration_is_a_file_with_the_same_settings(tmp_path: Path, text: str) -> None:
    config = loaded(tmp_path / "rebpf.toml", text)
    assert loaded(tmp_path / "again.toml", effective.as_toml(config, {})) == config


def test_each_value_has_its_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rebpf.toml", '[kafka]\nbrokers = "a:1"\nkey = "flow"\n[[rules]]\nport = [1]\n')
    second = write(tmp_path / "conf.d" / "10.toml", '[kafka]\nbrokers = "b:1"\n[[rules]]\n')
    lines = effective.as_toml(load(path), sources.read(path).origins()).splitlines()
    assert f'brokers = "b:1"  # {second}:2' in lines
    assert f'key = "flow"  # {path}:3' in lines
    assert [line for line in lines if line.startswith("[[rules]]")] == [
        f"[[rules]]  # {path}:4",
        f"[[rules]]  # {second}:3",
    ]


def test_a_value_in_an_inline_table_has_the_line_of_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "rebpf.toml", '[topics]\nflow = {"retention.ms" = 1}\n')
    lines = effective.as_toml(load(path), sources.read(path).origins()).splitlines()
    assert f'"retention.ms" = "1"  # {path}:2' in lines


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://hooks.example/services/T0/hunter2", "https://hooks.example/***"),
        ("http://hook:80?token=hunter2", "http://hook:80/***"),
        ("http://[::1]:80/#hunter2", "http://[::1]:80/***"),
        ("http://hook:80/", "http://hook:80/"),
        ("http://hook:80", "http://hook:80"),
    ],
)
def test_the_path_of_a_webhook_is_not_shown(tmp_path: Path, url: str, shown: str) -> None:
    config = loaded(tmp_path / "rebpf.toml", f'[alert]\nwebhook = "{url}"')
    assert effective.settings(config)["alert.webhook"] == shown
    assert f'webhook = "{shown}"' in effective.as_toml(config, {})


def test_no_secret_is_shown_or_changes_the_hash(tmp_path: Path) -> None:
    config = loaded(tmp_path / "rebpf.toml", SECRETS)
    assert config.kafka.settings["sasl.password"] == "hunter2"
    shown = effective.as_toml(config, {}) + json.dumps(effective.settings(config))
    assert "hunter2" not in shown
    assert '"sasl.username" = "rebpf"' in shown
    rotated = loaded(tmp_path / "rebpf.toml", SECRETS.replace("hunter2", "hunter3"))
    assert effective.digest(rotated) == effective.digest(config)
    assert len(effective.restart_needed(config, rotated)) == SECRETS.count("hunter2")


def test_a_secret_that_was_renewed_in_its_file_needs_no_restart(tmp_path: Path) -> None:
    """The client reads it again when brokers refuse the earlier one."""
    configs = []
    for name, secret in (("a", "1"), ("a", "2"), ("b", "2")):
        (tmp_path / name).write_text(secret)
        configs.append(loaded(tmp_path / "rebpf.toml", f'kafka.settings = {{"sasl.password" = "@{tmp_path / name}"}}'))
    first, renewed, other = configs
    assert renewed.kafka.settings["sasl.password"] == "2"
    assert effective.restart_needed(first, renewed) == ()
    assert effective.restart_needed(first, other) == ("kafka.settings.sasl.password",)


def test_hosts_with_the_same_settings_have_the_same_hash() -> None:
    pods = {name: Kubernetes(f"https://api/pods?fieldSelector=spec.nodeName%3D{name}") for name in ("a", "b")}
    digests = {effective.digest(Config(host=name, labels={"dc": name}, kubernetes=pods[name])) for name in pods}
    assert digests == {effective.digest(Config())}
    assert effective.digest(Config().with_values(kafka__brokers="a:1")) not in digests


def _others(config: Any, path: str = "") -> dict[str, Any]:
    """Return another value for each setting."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), path + field.name
        if dataclasses.is_dataclass(value):
            found |= _others(value, f"{name}__")
        else:
            found[name] = object()
    return found


@pytest.mark.parametrize("path", _others(Config()))
def test_each_setting_is_applied_or_needs_a_restart(path: str) -> None:
    """A changed setting is in force after a reload, or named in the answer; those of other commands are neither."""
    section, _, name = path.rpartition("__")
    changed = Config()
    is_table = isinstance(getattr(getattr(changed, section) if section else changed, name), Mapping)
    other: Any = {"x": "y"} if is_table else object()
    inner = dataclasses.replace(getattr(changed, section) if section else changed, **{name: other})
    changed = dataclasses.replace(changed, **{section: inner}) if section else inner
    is_applied = effective.in_force(Config(), changed) == changed
    named = effective.restart_needed(Config(), changed)
    dotted = path.replace("__", ".")
    if section in ("alert", "topics"):
        assert (is_applied, named) == (False, ())
    elif is_applied:
        assert named == ()
    else:
        assert named == (f"{dotted}.x" if is_table else dotted,)
    assert is_applied == (dotted in effective.AT_RELOAD)
