"""Checks the form and range of each setting, once, on the merged configuration.

Nothing here depends on the host: rules/resolve looks up the names of users, interfaces and cgroups later.
"""

import ipaddress
import json
import math
import os
import re
import socket
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from producer.config.alerts import GROUPS, MEASURES, SILENT
from producer.config.convert import nearest
from producer.config.librdkafka import check_allowed, check_times
from producer.errors import ConfigError
from producer.events import CAUSES, HOOKS, STATES
from producer.host.endpoints import without_path
from producer.host.text import name as name_of

LOG_LEVELS = ("debug", "info", "warning", "error")

_ACTIONS = ("keep", "drop")
_MAX_RING_BYTES = 1 << 30
_MAX_EVENTS_PER_S = 10**9
_MIN_SPOOL_BYTES = 1 << 18
_MAX_SPOOL_BYTES = 1 << 50
_MAX_PREFIX = 200
"""Kafka limits topic names to 249 characters; this leaves enough for the longest of ours."""
_MAX_TEXT = 4096
_MAX_NAME = 255
"""Of files and folders, in bytes."""
_MAX_LABELS = 16
_MAX_LABEL = 64
_LABEL_NAME = re.compile(r"[a-z_][a-z0-9_]{0,31}")
_RESERVED_LABELS = ("instance", "job")
_MAX_RULE_TEXTS = 2000
"""Of a rule's labels or annotations, in JSON: readers of alerts decode at most 4096 characters."""
_DAY_S = 86400.0
_SECONDS: Mapping[str, tuple[float, float]] = {
    "capture.latency_s": (0.02, 60),
    "capture.flow_interval_s": (1, 3600),
    "kafka.stop_timeout_s": (0, _DAY_S),
    "registry.timeout_s": (0.001, 3600),
    "spool.spill_after_s": (0.1, 3600),
    "spool.max_age_s": (1, 3660 * _DAY_S),
    "alert.lateness_s": (0, _DAY_S),
    "alert.wait_s": (1, _DAY_S),
    "alert.lookback_s": (0, _DAY_S),
    "alert.repeat_s": (1, 30 * _DAY_S),
}
_NUMBERS = {"uid": (0, (1 << 32) - 2), "netns": (1, (1 << 32) - 1), "interface": (1, (1 << 31) - 1)}
"""Ranges of the kernel's types. The user id 4294967295 means no user."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_HOST = re.compile(rf"\[[0-9A-Fa-f:.]+\]|(?=.{{1,253}}(?::|$)){_LABEL}(?:\.{_LABEL})*\.?")
_BROKER = re.compile(rf"(?:([A-Za-z0-9_]+)://)?(?:{_HOST.pattern})(?::([0-9]{{1,5}}))?")


def host_name() -> str:
    """Return the kernel's host name as printable text."""
    return name_of(os.fsencode(socket.gethostname()))


def check(config: Any) -> None:
    """Raise ConfigError for the first setting of a Config that is out of range or malformed."""
    if config.host != host_name():  # the kernel's own name is always valid
        _check_text("host", config.host, 255)
    _check_path("state_dir", config.state_dir, absolute=True)
    _check_choice("log_level", config.log_level, LOG_LEVELS)
    _check_labels(config.labels)
    _check_capture(config.capture)
    _check_kafka(config.kafka)
    for feed in ("transmit", "retransmit", "flow", "heartbeat"):
        for name, value in getattr(config.topics, feed).items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"topics.{feed}: expected the name of a Kafka topic setting, found {name!r}")
            _check_text(f"topics.{feed}.{name}", value)
    for name, (least, most) in _SECONDS.items():
        section, _, key = name.partition(".")
        check_seconds(name, getattr(getattr(config, section), key), least, most)
    _check_spool(config.spool)
    check_times(config.kafka.settings, config.spool.spill_after_s)
    if config.metrics.listen:
        _check_listen("metrics.listen", config.metrics.listen)
    _check_path("metrics.web_config_file", config.metrics.web_config_file)
    _check_registry(config.registry)
    if config.kubernetes.pods_url is not None:
        _check_url("kubernetes.pods_url", config.kubernetes.pods_url)
    for name in ("token", "ca"):
        _check_path(f"kubernetes.{name}", getattr(config.kubernetes, name), absolute=True)
    _check_alert(config.alert)
    for number, rule in enumerate(config.rules, 1):
        _check_rule(f"rules[{number}]", rule)


def check_seconds(name: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError if a time is out of its range."""
    if not least <= value <= most:
        raise ConfigError(f"{name}: expected {least} to {most:g} seconds, found {value}")


def _check_text(name: str, value: str, most: int = _MAX_TEXT) -> None:
    if not value.strip():
        raise ConfigError(f"{name}: expected a name, found an empty string")
    if (size := len(value.encode(errors="replace"))) > most:
        raise ConfigError(f"{name}: expected at most {most} bytes in UTF-8, found {size}")
    if not value.isprintable():
        raise ConfigError(f"{name}: expected printable characters, found {value!r}")


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > _MAX_LABELS:
        raise ConfigError(f"labels: expected at most {_MAX_LABELS} labels, found {len(labels)}")
    for name, value in labels.items():
        if not _LABEL_NAME.fullmatch(name):
            raise ConfigError(
                f"labels: expected a name of at most 32 lower-case letters, digits and underscores, found {name!r}"
            )
        if name in _RESERVED_LABELS or name.startswith("__"):
            raise ConfigError(f"labels: expected a name other than {name!r}, which Prometheus reserves")
        _check_text(f"labels.{name}", value)
        if len(value) > _MAX_LABEL:
            raise ConfigError(f"labels.{name}: expected at most {_MAX_LABEL} characters, found {len(value)}")


def _check_path(name: str, path: Path | None, *, absolute: bool = False) -> None:
    if path is None:
        return
    _check_text(name, str(path))
    if any(len(os.fsencode(part)) > _MAX_NAME for part in path.parts):
        raise ConfigError(f"{name}: expected names of at most {_MAX_NAME} bytes in the path")
    if absolute and not path.is_absolute():
        raise ConfigError(f"{name}: expected an absolute path, found {str(path)!r}")


def _check_capture(capture: Any) -> None:
    if not capture.streams:
        raise ConfigError("capture: expected transmit, retransmit or flow to be true, found none of them")
    for name in ("transmit_ring_bytes", "retransmit_ring_bytes", "flow_ring_bytes"):
        size = getattr(capture, name)
        page = os.sysconf("SC_PAGE_SIZE")
        if not page <= size <= _MAX_RING_BYTES or size & size - 1:
            raise ConfigError(
                f"capture.{name}: expected a power of two from {page} to {_MAX_RING_BYTES} bytes, found {size}"
            )
    if not 0 <= capture.transmit_events_per_s <= _MAX_EVENTS_PER_S:
        found = capture.transmit_events_per_s
        raise ConfigError(f"capture.transmit_events_per_s: expected 0 to {_MAX_EVENTS_PER_S}, found {found}")
    if not capture.hooks:
        raise ConfigError(f"capture.hooks: expected at least one of {', '.join(HOOKS)}")
    for hook in capture.hooks:
        if hook not in HOOKS:
            raise ConfigError(f"capture.hooks: unknown hook {hook}{nearest(hook, HOOKS)}")
    for port in capture.ports:
        if not 0 < port < 1 << 16:
            raise ConfigError(f"capture.ports: expected a port from 1 to 65535, found {port}")
    for address in capture.addresses:
        if getattr(address, "scope_id", None):
            raise ConfigError(f"capture.addresses: expected an address without an interface, found {str(address)!r}")
    _check_choice("capture.default", capture.default, _ACTIONS)
    _check_path("capture.pin", capture.pin, absolute=True)
    _check_path("capture.btf", capture.btf, absolute=True)
    _check_path("capture.programs", capture.programs, absolute=True)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected {' or '.join(choices)}, found {value!r}")


def _check_kafka(kafka: Any) -> None:
    if kafka.brokers is not None:
        _check_brokers(kafka.brokers, kafka.settings.get("security.protocol", "plaintext").lower())
    if not re.fullmatch(r"[A-Za-z0-9._-]*", kafka.topic_prefix):
        raise ConfigError(
            f"kafka.topic_prefix: expected letters, digits, dots, underscores and hyphens, found {kafka.topic_prefix!r}"
        )
    if len(kafka.topic_prefix) > _MAX_PREFIX:
        raise ConfigError(
            f"kafka.topic_prefix: expected at most {_MAX_PREFIX} characters, found {len(kafka.topic_prefix)}"
        )
    _check_choice("kafka.key", kafka.key, ("host", "flow"))
    for name, value in kafka.settings.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"kafka.settings: expected the name of a librdkafka setting, found {name!r}")
        if "\0" in value:  # librdkafka would cut the value there
            raise ConfigError(f"kafka.settings.{name}: expected a value without NUL")
    check_allowed(kafka.settings)


def _check_brokers(brokers: str, protocol: str) -> None:
    if not brokers.strip():
        raise ConfigError(
            "kafka.brokers: expected HOST:PORT[,HOST:PORT...], found an empty string; "
            "for the in-process test broker, remove the setting"
        )
    if len(brokers) > 1 << 14:
        raise ConfigError(f"kafka.brokers: expected at most {1 << 14} characters, found {len(brokers)}")
    for broker in brokers.split(","):
        found = _BROKER.fullmatch(broker.strip())
        if not found or (found[2] and not 0 < int(found[2]) < 1 << 16):
            raise ConfigError(f"kafka.brokers: expected HOST:PORT[,HOST:PORT...], found {broker!r}")
        if found[1] and found[1].lower() != protocol:  # librdkafka would leave out this broker and all after it
            raise ConfigError(f"kafka.brokers: expected {protocol}, as security.protocol says, found {broker!r}")


def _check_spool(spool: Any) -> None:
    for name in ("transmit_bytes", "retransmit_bytes", "flow_bytes", "quarantine_bytes"):
        size = getattr(spool, name)
        if size < 0 or 0 < size < _MIN_SPOOL_BYTES:
            raise ConfigError(f"spool.{name}: expected 0, or at least {_MIN_SPOOL_BYTES} bytes, found {size}")
        if size > _MAX_SPOOL_BYTES:
            raise ConfigError(f"spool.{name}: expected at most {_MAX_SPOOL_BYTES} bytes, found {size}")
    _check_choice("spool.when_full", spool.when_full, ("reject", "drop_oldest"))


def _check_listen(name: str, listen: str) -> None:
    _check_text(name, listen, 300)
    host, _, port = listen.rpartition(":")
    if not _is_host(host):
        raise ConfigError(f"{name}: expected HOST:PORT, found {listen!r}")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) >= 1 << 16:
        raise ConfigError(f"{name}: expected a port from 0 to 65535, found {listen!r}")


def _is_host(text: str) -> bool:
    return bool(_HOST.fullmatch(text)) or _is_address(text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_registry(registry: Any) -> None:
    if registry.url is not None:
        if "@" in registry.url:
            raise ConfigError("registry.url: expected no user or password in the URL: set registry.auth to a file")
        _check_url("registry.url", registry.url)
    if registry.key is not None and registry.certificate is None:
        raise ConfigError("registry.key: expected registry.certificate, too")
    for name in ("auth", "ca", "certificate", "key"):
        _check_path(f"registry.{name}", getattr(registry, name))


def _check_url(name: str, url: str) -> None:
    _check_text(name, url)
    if "@" in url.partition("//")[2].partition("/")[0]:  # they would not be sent, but logged
        raise ConfigError(f"{name}: expected no user or password in the URL")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{name}: expected a URL, found {_shown(name, url)!r}: {error}") from error
    is_sendable = url.isascii() and " " not in url
    if parts.scheme not in ("http", "https") or not _is_host(parts.hostname or "") or port == 0 or not is_sendable:
        raise ConfigError(f"{name}: expected a URL, http://HOST:PORT, found {_shown(name, url)!r}")


def _shown(name: str, url: str) -> str:
    return without_path(url) if name == "alert.webhook" else url


def _check_alert(alert: Any) -> None:
    if not alert.group:
        raise ConfigError("alert.group: expected a name, found an empty string")
    _check_text("alert.group", alert.group, 249)
    if alert.listen:
        _check_listen("alert.listen", alert.listen)
    if not 0 <= alert.missed_heartbeats <= 1e6:
        found = alert.missed_heartbeats
        raise ConfigError(f"alert.missed_heartbeats: expected a number from 0 to 1000000, found {found}")
    for name in ("alertmanager", "webhook"):
        if getattr(alert, name) is not None:
            _check_url(f"alert.{name}", getattr(alert, name))
    names: set[str] = set()
    for number, rule in enumerate(alert.rules, 1):
        where = f"alert.rules[{number}]"
        if not _NAME.fullmatch(rule.name) or rule.name == SILENT:
            raise ConfigError(
                f"{where}.name: expected letters, digits, dots, underscores and hyphens, and not {SILENT!r}, "
                f"which is the built-in rule's name; found {rule.name!r}"
            )
        if rule.name in names:
            raise ConfigError(f"{where}.name: expected a unique name, found another rule {rule.name}")
        names.add(rule.name)
        _check_alert_rule(where, rule)
        _check_alert_filters(where, rule)


def _check_alert_rule(where: str, rule: Any) -> None:
    for key, value, known in (("by", rule.by, GROUPS), ("measure", rule.measure, MEASURES)):
        if value not in known:
            raise ConfigError(f"{where}.{key}: expected one of {', '.join(known)}, found {value!r}")
    check_seconds(f"{where}.window_s", rule.window_s, 1, 30 * _DAY_S)
    check_seconds(f"{where}.for_s", rule.for_s, 0, 30 * _DAY_S)
    most = 1.0 if rule.measure in ("ratio", "data_ratio") else math.inf
    if not 0 < rule.threshold <= most or math.isinf(rule.threshold):
        raise ConfigError(f"{where}.threshold: expected above 0 and at most {most:g}, found {rule.threshold}")
    if not 0 < rule.clear <= rule.threshold:
        raise ConfigError(f"{where}.clear: expected above 0 and at most the threshold, found {rule.clear}")
    if not 0 < rule.quantile < 1:
        raise ConfigError(f"{where}.quantile: expected above 0 and below 1, found {rule.quantile}")
    if rule.minimum < 0:
        raise ConfigError(f"{where}.minimum: expected at least 0, found {rule.minimum}")
    for key, bits in (("prefix", 32), ("prefix_v6", 128)):
        if not 0 <= getattr(rule, key) <= bits:
            raise ConfigError(f"{where}.{key}: expected 0 to {bits}, found {getattr(rule, key)}")


def _check_alert_filters(where: str, rule: Any) -> None:
    for key in ("host", "unit"):
        for pattern in getattr(rule, key):
            _check_text(f"{where}.{key}", pattern, 255)
    for network in rule.peer:
        _check_network(f"{where}.peer", network)
    for port in rule.port:
        _check_ports(f"{where}.port", port)
    if rule.measure == "srtt" and rule.cause:
        raise ConfigError(f"{where}.cause: expected no causes, since round-trip times have none")
    for cause in rule.cause:
        known = re.fullmatch("E[A-Z0-9]+|closed", cause) if rule.measure == "failed_connects" else cause in CAUSES
        if not known:
            expected = "names of errors, or closed" if rule.measure == "failed_connects" else ", ".join(CAUSES)
            raise ConfigError(f"{where}.cause: expected {expected}, found {cause!r}")
    _check_text(f"{where}.severity", rule.severity, 64)
    for key in ("only_labels", "labels", "annotations"):
        for name, value in getattr(rule, key).items():
            if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name):
                raise ConfigError(f"{where}.{key}: expected letters, digits and underscores, found {name!r}")
            _check_text(f"{where}.{key}.{name}", value)
        if len(json.dumps(dict(getattr(rule, key)))) > _MAX_RULE_TEXTS:
            raise ConfigError(f"{where}.{key}: expected at most {_MAX_RULE_TEXTS} characters in all")


def _check_rule(where: str, rule: Any) -> None:
    if rule.name:
        _check_text(f"{where}.name", rule.name, 255)
    for key in ("action", "transmit", "retransmit", "flow"):
        value = getattr(rule, key)
        if value is not None:
            _check_choice(f"{where}.{key}", value, _ACTIONS)
    if not 1 <= rule.sample < 1 << 31:
        raise ConfigError(f"{where}.sample: expected a number from 1 to {(1 << 31) - 1}, found {rule.sample}")
    _check_choice(f"{where}.sample_by", rule.sample_by, ("connection", "event"))
    for key in ("address", "local_address", "remote_address"):
        for text in getattr(rule, key):
            if text.startswith("@"):
                _check_text(f"{where}.{key}", text[1:])
            else:
                _check_network(f"{where}.{key}", text)
    for key in ("port", "local_port", "remote_port"):
        for value in getattr(rule, key):
            _check_ports(f"{where}.{key}", value)
    for key, (least, most) in _NUMBERS.items():
        for value in getattr(rule, key):
            if isinstance(value, str):
                _check_name(f"{where}.{key}", value)
            elif not least <= value <= most:
                raise ConfigError(f"{where}.{key}: expected a number from {least} to {most}, found {value}")
    for unit in rule.unit:
        _check_name(f"{where}.unit", unit)
    for cgroup in rule.cgroup:
        _check_text(f"{where}.cgroup", cgroup)
        if ".." in cgroup.split("/"):
            raise ConfigError(f"{where}.cgroup: expected a path below the cgroup root, found {cgroup!r}")
    for state in rule.state:
        if state not in STATES[1:]:
            raise ConfigError(f"{where}.state: expected one of {', '.join(STATES[1:])}, found {state!r}")


def _check_name(where: str, name: str) -> None:
    _check_text(where, name, 255)
    if "/" in name or name in (".", ".."):
        raise ConfigError(f"{where}: expected a name, found the path {name!r}")


def _check_network(where: str, text: str) -> None:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if "%" in str(network):
        raise ConfigError(f"{where}: expected an address without an interface, found {text!r}")


def _check_ports(where: str, value: int | str) -> None:
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", str(value))
    if not found or not int(found[1]) <= int(found[2] or found[1]) < 1 << 16:
        raise ConfigError(f"{where}: expected a port or a range of ports, found {value!r}")
