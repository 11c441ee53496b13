"""The effective configuration: its settings by path, without secrets; its hash; and what a reload changes of it."""

import dataclasses
import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from producer.config.load import Config

MASK = "***"

AT_RELOAD = (
    "rules",
    "labels",
    "log_level",
    "reload_when_changed",
    "capture.addresses",
    "capture.ports",
    "capture.default",
    "capture.latency_s",
    "kafka.stop_timeout_s",
    "spool.spill_after_s",
)
"""Settings that a reload applies to the running producer. All others need a restart."""
_NOT_OF_THE_PRODUCER = ("alert.", "topics.")
"""Settings that only `rebpf alert` and `rebpf init` read, when they start."""
_OF_THE_HOST = ("host", "labels.")
"""Settings that differ between hosts with the same configuration, so that the hash leaves them out."""

_SETTINGS = "kafka.settings"
_SECRET = re.compile(r"password|passphrase|secret|key\.pem|oauthbearer\.config")
_USER_INFO = re.compile(r"//[^/@]*@")


def settings(config: Config) -> dict[str, Any]:
    """Return each setting by its path, in the types of JSON. Secrets are masked; lists of tables are one value."""
    return {path: _plain(_masked(path, value)) for path, value in _leaves(config)}


def digest(config: Config) -> str:
    """Return 16 hexadecimal digits that are equal for hosts with the same settings, apart from names and secrets."""
    same = {path: value for path, value in settings(config).items() if not path.startswith(_OF_THE_HOST)}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def in_force(running: Config, read: Config) -> Config:
    """Return `running` with the settings of `read` that a reload applies."""
    for path in AT_RELOAD:
        section, _, name = path.rpartition(".")
        if not section:
            running = dataclasses.replace(running, **{name: getattr(read, name)})
        else:
            value = getattr(getattr(read, section), name)
            running = dataclasses.replace(
                running, **{section: dataclasses.replace(getattr(running, section), **{name: value})}
            )
    return running


def restart_needed(running: Config, read: Config) -> tuple[str, ...]:
    """Return the settings in which `read` differs from `running` and that a reload does not apply."""
    now, then = dict(_leaves(read)), dict(_leaves(running))
    changed = {path for path in now.keys() | then.keys() if now.get(path) != then.get(path)}
    others = (path for path in changed if path not in AT_RELOAD and not path.startswith(_NOT_OF_THE_PRODUCER))
    return tuple(sorted(path for path in others if path.partition(".")[0] not in AT_RELOAD))


def as_toml(config: Config, origins: Mapping[str, str]) -> str:
    """Return the configuration as TOML without secrets. `origins` has where values come from, for comments."""
    tables = [f"{path}." for path in _tables(config)]
    sections: dict[str, list[str]] = {"": []}
    lists = []
    for path, value in settings(config).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for number, each in enumerate(value, 1):
                head = f"[[{path}]]" + _comment(origins.get(f"{path}[{number}]"))
                lists.append([head, *(_line(name, item) for name, item in each.items())])
        else:
            table = next((each for each in tables if path.startswith(each)), "")
            section = table.removesuffix(".") or path.rpartition(".")[0]
            line = _line(path.removeprefix(f"{section}."), value) + _comment(origins.get(path))
            sections.setdefault(section, [f"[{section}]"]).append(line)
    return "\n\n".join("\n".join(block) for block in [*sections.values(), *lists])


def _comment(origin: str | None) -> str:
    return f"  # {origin}" if origin else ""


def _tables(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of tables with any keys."""
    for field in dataclasses.fields(value):
        each, name = getattr(value, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(each):
            yield from _tables(each, f"{name}.")
        elif isinstance(each, Mapping):
            yield name


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        each, name = getattr(value, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(each):
            yield from _leaves(each, f"{name}.")
        elif isinstance(each, Mapping):
            yield from ((f"{name}.{key}", text) for key, text in sorted(each.items()))
        else:
            yield name, each


def _masked(path: str, value: Any) -> Any:
    if path.startswith(f"{_SETTINGS}.") and _SECRET.search(path):
        return MASK
    return _USER_INFO.sub(f"//{MASK}@", value) if path.endswith(("url", "alertmanager")) and value else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path | ipaddress.IPv4Address | ipaddress.IPv6Address) else value


def _line(name: str, value: Any) -> str:
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    # Printable strings, numbers, booleans and lists are the same in JSON and TOML.
    return f"# {key} is not set" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
