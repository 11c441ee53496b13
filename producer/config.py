"""The configuration: what can be set, where it comes from, and what is refused.

A TOML file, then the environment and the command line, which the command line module lays over it. Each setting is a
field of a frozen dataclass here, with its default; a key that is none of them is refused, and the nearest that there is
is named.
"""

import contextlib
import dataclasses
import math
import os
import re
import socket
import tomllib
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer import place
from producer.errors import ConfigError
from producer.events import HOOKS
from producer.table import Address, build, nearest

_LEAST_SPOOL_BYTES = 1 << 18
_LISTEN = re.compile(r".+:\d{1,5}")
_SECRETS = frozenset({"sasl.password", "ssl.key.password", "ssl.keystore.password", "sasl.oauthbearer.client.secret"})
_RULE_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TOPIC_CHARACTERS = re.compile(r"[A-Za-z0-9._-]*")

GROUPS = ("host", "peer", "flow", "port")
"""What an alert rule may judge by itself."""
MEASURES = ("count", "ratio")
SILENT = "silent"
"""The name of the rule that alerts on hosts whose heartbeats have stopped."""


@dataclass(frozen=True, slots=True)
class Capture:
    """[capture]: what is taken from the kernel, and how."""

    hooks: tuple[str, ...] = HOOKS
    """Hooks that may be used; the best that the kernel allows is."""
    addresses: tuple[Address, ...] = ()
    """Only segments from or to one of these addresses; none: all."""
    ports: tuple[int, ...] = ()
    """Only segments from or to one of these ports; none: all."""
    default: str = "keep"
    """What becomes of a segment that no rule matches: keep or drop."""
    transmit_ring_bytes: int = 1 << 24
    """Size of transmit_pipe: a power of two, in bytes. A segment takes 200 bytes."""
    retransmit_ring_bytes: int = 1 << 22
    """Size of retransmit_pipe, likewise."""
    pin: Path | None = None
    """Folder in a bpffs, below /sys/fs/bpf, that keeps rings and hooks over a crash for the next start."""
    drain_interval_s: float = 0.1
    """Seconds between two readings of the rings."""
    btf: Path | None = None
    """BTF to read struct layouts from, where it is not /sys/kernel/btf/vmlinux."""


@dataclass(frozen=True, slots=True)
class Kafka:
    """[kafka]: where events go."""

    brokers: str | None = None
    """HOST:PORT, several separated by commas; none: the embedded broker, for trying."""
    topic_prefix: str = ""
    """What stands before the topics' names."""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Settings of librdkafka, by its own names, passed on as they are; a secret as "@FILE", or as "@NAME" of a systemd
    credential."""
    stop_timeout_s: float = 10.0
    """Seconds that a stop waits for messages in flight."""


@dataclass(frozen=True, slots=True)
class Spool:
    """[spool]: where events wait while Kafka does not take them."""

    transmit_bytes: int = 1 << 30
    """Most bytes on disk of transmits; 0: none wait there. An event takes 17 to 86 bytes."""
    retransmit_bytes: int = 1 << 28
    """Likewise of retransmits."""
    max_age_s: float = 7 * 86400.0
    """Seconds after which events that wait are given up."""
    quarantine_bytes: int = 1 << 26
    """Most bytes on disk, for each stream, of messages that Kafka has refused; 0: none are kept."""
    keep: str = "old"
    """Which events to keep where there is no room: old or new."""
    after_s: float = 2.0
    """Seconds that Kafka may take for a batch before events go to disk."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """[metrics]: where the producer tells how it is."""

    listen: str = "127.0.0.1:9465"
    """HOST:PORT of the HTTP endpoint; empty: none; port 0: any that is free."""


@dataclass(frozen=True, slots=True)
class Registry:
    """[registry]: where schemas get their ids."""

    url: str | None = None
    """A Confluent-compatible schema registry; none: the ids 1 (transmit), 2 (retransmit), 3 (heartbeat), 4 (alerts)."""
    register: bool = False
    """Register the schemas at start; otherwise they are looked up, and `rebpf init` registers them."""
    timeout_s: float = 5.0
    """Seconds for one request."""
    auth: Path | None = None
    """File with USER:PASSWORD for HTTP's basic authentication; a mere name: of a systemd credential."""
    ca: Path | None = None
    """File or folder of the certificates that the registry's is checked with; none: certifi's."""
    certificate: Path | None = None
    """This client's certificate, for a registry that wants one."""
    key: Path | None = None
    """Its private key, where that is in a file of its own."""


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """[[rules]]: the first rule that matches a segment decides. Of each condition that it has, one value must match."""

    name: str = ""
    action: str = "keep"
    """keep or drop, for both streams."""
    transmit: str | None = None
    """keep or drop, for transmits, where that differs."""
    retransmit: str | None = None
    """Likewise, for retransmits."""
    sample: int = 1
    """Take one transmit in so many; the events' sample_rate says so."""
    sample_by: str = "connection"
    """connection: all of a connection or none of it; event: each by itself."""
    sample_retransmits: bool = False
    """Sample retransmits too."""
    address: tuple[str, ...] = ()
    """Addresses or networks, of either side; "@FILE" stands for a file's lines."""
    local_address: tuple[str, ...] = ()
    """Of this host's side."""
    remote_address: tuple[str, ...] = ()
    """Of the peer's side."""
    port: tuple[int | str, ...] = ()
    """Ports, or ranges like "8000-8999", of either side."""
    local_port: tuple[int | str, ...] = ()
    """Of this host's side."""
    remote_port: tuple[int | str, ...] = ()
    """Of the peer's side."""
    netns: tuple[int | str, ...] = ()
    """Network namespaces: inode numbers, or names in /run/netns."""
    cgroup: tuple[str, ...] = ()
    """Cgroups by their path below the cgroup v2 root, and all below them."""
    unit: tuple[str, ...] = ()
    """Cgroups by the name of a systemd unit, and all below them."""
    uid: tuple[int | str, ...] = ()
    """Owners of the socket: user ids or names."""
    interface: tuple[int | str, ...] = ()
    """Interfaces that the segment leaves by, which only the hook cgroup_skb knows."""
    state: tuple[str, ...] = ()
    """TCP states of the socket."""


@dataclass(frozen=True, slots=True)
class AlertRule:
    """[[alert.rules]]: what `rebpf alert` looks for in each window of the events' time."""

    name: str = ""
    """Name in the alerts."""
    by: str = "host"
    """What is judged by itself: each host, peer (remote address), flow or port (of both ends the lower)."""
    measure: str = "ratio"
    """count: segments sent again; ratio: their share of all segments sent."""
    window_s: float = 60.0
    """Length of a window, in seconds."""
    threshold: float = 0.05
    """Fires from this value on."""
    clear: float = 0.02
    """Is resolved below this value; between the two nothing changes."""
    minimum: int = 1
    """Windows with fewer segments (ratio: of all, count: sent again) do not fire."""


@dataclass(frozen=True, slots=True)
class Alert:
    """[alert]: the alerting consumer, `rebpf alert`."""

    group: str = "rebpf-alert"
    """Kafka's consumer group, whose members share the work."""
    lateness_s: float = 10.0
    """Seconds that an event may take to get into Kafka: so long a window waits for events after its end."""
    silent_after: float = 3.0
    """A host whose heartbeat is overdue by so many of its intervals is silent; 0: no alerts on silence."""
    topic: bool = True
    """Put alerts into the topic tcp_alerts, from which a member that takes over learns what fires."""
    stdout: bool = False
    """Write alerts to standard output."""
    alertmanager: str | None = None
    """URL of an Alertmanager that is told too."""
    repeat_s: float = 60.0
    """Seconds after which Alertmanager is told again of what still fires."""
    rules: tuple[AlertRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Config:
    """All settings."""

    host: str = field(default_factory=socket.gethostname)
    """This host's name in the events."""
    state_dir: Path = Path("/var/lib/rebpf")
    """Folder for spool, quarantine, ledger and compiled programs, for what a run leaves for others to find, and for the
    lock that keeps a second producer out."""
    capture: Capture = Capture()
    kafka: Kafka = Kafka()
    spool: Spool = Spool()
    metrics: Metrics = Metrics()
    registry: Registry = Registry()
    alert: Alert = Alert()
    rules: tuple[RuleConfig, ...] = ()

    def with_values(self, **values: Any) -> "Config":
        """Return a copy with values laid over: `kafka__brokers=...`; a value of None or () changes nothing."""
        changed = self
        for path, value in values.items():
            if value is not None and value != ():
                section, _, name = path.rpartition("__")
                if path == "registry__url":
                    _check_url(value)
                if section:
                    inner = dataclasses.replace(getattr(changed, section), **{name: value})
                    changed = dataclasses.replace(changed, **{section: inner})
                else:
                    changed = dataclasses.replace(changed, **{name: value})
        return changed


def load(path: Path | None) -> Config:
    """Read a TOML file; without one, all settings have their defaults. ConfigError says what is wrong."""
    if path is None:
        return Config()
    try:
        text = path.read_text()
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    with placed(path, text):
        return _with_secrets(check(build(Config, table)))


@contextlib.contextmanager
def placed(path: Path | None, text: str | None = None) -> Iterator[None]:
    """Have a ConfigError that begins with a setting's path name the file and the line too."""
    try:
        yield
    except ConfigError as error:
        if path is None:
            raise
        at = place.line(path.read_text() if text is None else text, str(error))
        raise ConfigError(f"{path}: {at}{error}") from error


def check(config: Config) -> Config:
    """Return `config`; ConfigError where values do not fit."""
    capture = config.capture
    for name in ("transmit_ring_bytes", "retransmit_ring_bytes"):
        size = getattr(capture, name)
        if size < os.sysconf("SC_PAGE_SIZE") or size & size - 1:
            raise ConfigError(f"capture.{name}: {size} is not a power of two of at least one page")
    for hook in capture.hooks:
        if hook not in HOOKS:
            raise ConfigError(f"capture.hooks: there is no hook {hook}{nearest(hook, HOOKS)}")
    for port in capture.ports:
        if not 0 < port < 1 << 16:
            raise ConfigError(f"capture.ports: {port} is no port")
    if config.kafka.brokers is not None and not config.kafka.brokers.strip():
        raise ConfigError("kafka.brokers: HOST:PORT is wanted, several separated by commas, not an empty string")
    if not _TOPIC_CHARACTERS.fullmatch(config.kafka.topic_prefix):
        raise ConfigError("kafka.topic_prefix: topics' names are of letters, digits, dots, underscores and hyphens")
    _check_seconds("capture.drain_interval_s", capture.drain_interval_s, least=0.001)
    _check_seconds("kafka.stop_timeout_s", config.kafka.stop_timeout_s, least=0)
    _check_seconds("registry.timeout_s", config.registry.timeout_s, least=0.001)
    _check_seconds("spool.after_s", config.spool.after_s, least=0.1)
    _check_seconds("spool.max_age_s", config.spool.max_age_s, least=1)
    for name in ("transmit_bytes", "retransmit_bytes", "quarantine_bytes"):
        size = getattr(config.spool, name)
        if size < 0 or 0 < size < _LEAST_SPOOL_BYTES:
            raise ConfigError(f"spool.{name}: {size} is neither 0 nor at least {_LEAST_SPOOL_BYTES}")
    if config.spool.keep not in ("old", "new"):
        raise ConfigError(f"spool.keep: old or new is wanted, not {config.spool.keep!r}")
    if config.registry.url is not None:
        _check_url(config.registry.url)
    if config.metrics.listen and not _LISTEN.fullmatch(config.metrics.listen):
        raise ConfigError(f"metrics.listen: HOST:PORT is wanted, not {config.metrics.listen!r}")
    _check_alert(config.alert)
    return config


def _check_alert(alert: Alert) -> None:
    if not alert.group:
        raise ConfigError("alert.group: a name is wanted")
    _check_seconds("alert.lateness_s", alert.lateness_s, least=0)
    _check_seconds("alert.repeat_s", alert.repeat_s, least=1)
    if not 0 <= alert.silent_after < math.inf:
        raise ConfigError(f"alert.silent_after: {alert.silent_after} is not a number from 0")
    if alert.alertmanager is not None and urllib.parse.urlsplit(alert.alertmanager).scheme not in ("http", "https"):
        raise ConfigError(f"alert.alertmanager: a URL is wanted, not {alert.alertmanager!r}")
    names: set[str] = set()
    for number, rule in enumerate(alert.rules, 1):
        where = f"alert.rules[{number}]"
        if not _RULE_NAME.fullmatch(rule.name) or rule.name == SILENT:
            raise ConfigError(
                f"{where}.name: letters, digits, dots, underscores and hyphens are wanted, and not {SILENT!r}, "
                f"which is silence's own name: {rule.name!r}"
            )
        if rule.name in names:
            raise ConfigError(f"{where}.name: another rule is called {rule.name}")
        names.add(rule.name)
        for key, value, known in (("by", rule.by, GROUPS), ("measure", rule.measure, MEASURES)):
            if value not in known:
                raise ConfigError(f"{where}.{key}: one of {', '.join(known)} is wanted, not {value!r}")
        _check_seconds(f"{where}.window_s", rule.window_s, least=1)
        most = 1.0 if rule.measure == "ratio" else math.inf
        if not 0 < rule.threshold <= most:
            raise ConfigError(f"{where}.threshold: {rule.threshold} is not above 0 and at most {most:g}")
        if not 0 < rule.clear <= rule.threshold:
            raise ConfigError(f"{where}.clear: {rule.clear} is not above 0 and at most the threshold")
        if rule.minimum < 0:
            raise ConfigError(f"{where}.minimum: {rule.minimum} is below 0")


def read_secret(path: Path, where: str) -> str:
    """Return the first line of a secret's file, or of the systemd credential of that name; ConfigError without it."""
    if len(path.parts) == 1:
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise ConfigError(f"{where}: systemd has given no credential {path}: LoadCredential={path}:FILE")
        path = Path(folder) / path
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {path}: not UTF-8") from error  # which bytes is nobody's business
    if not lines or not lines[0]:
        raise ConfigError(f"{where}: {path}: its first line is empty")
    return lines[0]


def _with_secrets(config: Config) -> Config:
    """Return `config` with the secrets of Kafka's client, which are named as "@FILE", read."""
    settings = {
        name: read_secret(Path(value[1:]), f"kafka.settings.{name}") if name in _SECRETS and value[:1] == "@" else value
        for name, value in config.kafka.settings.items()
    }
    return config.with_values(kafka__settings=settings)


def _check_url(url: str) -> None:
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise ConfigError("registry.url: no user and password here, where others see them: set registry.auth to a file")


def _check_seconds(name: str, value: float, *, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(f"{name}: {value} is not a number of seconds from {least}")
