"""The effective configuration: its settings by path, without secrets; its hash; and what a reload changes of it."""

import dataclasses
import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from producer.config.load import Config, Secret, replaced
from producer.host.endpoints import MASK, without_path

AT_RELOAD = (
    "rules",
    "labels",
    "log_level",
    "reload_when_changed",
    "capture.addresses",
    "capture.ports",
    "capture.default",
    "capture.latency_s",
    "capture.retransmit_at_once",
    "capture.transmit_events_per_s",
    "capture.flow_interval_s",
    "kafka.stop_timeout_s",
    "spool.spill_after_s",
)
"""Settings that a reload applies to the running producer. All others need a restart."""
_NOT_OF_THE_PRODUCER = ("alert.", "topics.")
"""Settings that only `rebpf alert` and `rebpf init` read, when they start."""
_OF_THE_HOST = ("host", "labels.", "kubernetes.pods_url")
"""Settings that differ between hosts with the same configuration, so that the hash leaves them out."""

_SECRET = re.compile(r"password|passphrase|secret|key\.pem|oauthbearer\.config")


def settings(config: Config) -> dict[str, Any]:
    """Return each setting by its path, in the types of JSON. Secrets are masked; lists of tables are one value."""
    return {path: _plain(_masked(path, value)) for _, path, value in _leaves(config)}


def digest(config: Config) -> str:
    """Return 16 hexadecimal digits, equal for hosts with the same settings, apart from names, labels and secrets."""
    same = {path: value for path, value in settings(config).items() if not path.startswith(_OF_THE_HOST)}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def in_force(running: Config, read: Config) -> Config:
    """Return `running` with the settings of `read` that a reload applies."""
    for path in AT_RELOAD:
        running = replaced(running, path, attrgetter(path)(read))
    return running


def restart_needed(running: Config, read: Config) -> tuple[str, ...]:
    """Return the settings in which `read` differs from `running` and that a reload does not apply."""
    now, then = ({path: value for _, path, value in _leaves(each)} for each in (read, running))
    changed = {path for path in now.keys() | then.keys() if not _is_same(now.get(path), then.get(path))}
    others = (path for path in changed if path not in AT_RELOAD and not path.startswith(_NOT_OF_THE_PRODUCER))
    return tuple(sorted(path for path in others if path.partition(".")[0] not in AT_RELOAD))


def _is_same(now: Any, then: Any) -> bool:
    """Return whether two values are equal, or are secrets of one file, which the client reads again by itself."""
    both = isinstance(now, Secret) and isinstance(then, Secret)
    return now == then or (both and now.path == then.path)


def as_toml(config: Config, origins: Mapping[str, str]) -> str:
    """Return the configuration as TOML without secrets. `origins` has where values come from, for comments."""
    sections: dict[str, list[str]] = {"": []}
    lists = []
    shown = settings(config)
    for section, path, _ in _leaves(config):
        value = shown[path]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for number, each in enumerate(value, 1):
                head = f"[[{path}]]" + _comment(origins.get(f"{path}[{number}]"))
                lists.append([head, *(_line(name, item) for name, item in each.items())])
        else:
            line = _line(path.removeprefix(f"{section}."), value) + _comment(origins.get(path))
            sections.setdefault(section, [f"[{section}]"]).append(line)
    return "\n\n".join("\n".join(block) for block in [*sections.values(), *lists])


def _comment(origin: str | None) -> str:
    return f"  # {origin}" if origin else ""


def _leaves(value: Any, section: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the table, the path and the value of each setting."""
    for field in dataclasses.fields(value):
        each, path = getattr(value, field.name), f"{section}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(each):
            yield from _leaves(each, path)
        elif isinstance(each, Mapping):
            yield from ((path, f"{path}.{key}", text) for key, text in sorted(each.items()))
        else:
            yield section, path, each


def _masked(path: str, value: Any) -> Any:
    """URLs with a user or password are rejected; a webhook's often has a token in its path or query."""
    if path == "alert.webhook" and value is not None:
        return without_path(value)
    return MASK if path.startswith("kafka.settings.") and _SECRET.search(path) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, Path | ipaddress.IPv4Address | ipaddress.IPv6Address) else value


def _line(name: str, value: Any) -> str:
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    return f"# {key} is not set" if value is None else f"{key} = {_inline(value)}"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(each)}" for key, each in value.items()) + "}"
    # Printable strings, numbers, booleans and lists of these are the same in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)
