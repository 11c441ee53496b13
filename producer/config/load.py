"""The configuration: what can be set, where it comes from, and what is refused.

A TOML file, then the environment and the command line, which the command line module lays over it. Each setting is a
field of a frozen dataclass here, with its default; a key that is none of them is refused, and the nearest that there is
is named.
"""

import contextlib
import dataclasses
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer.config import locate, validate
from producer.config.convert import Address, build
from producer.config.validate import GROUPS as GROUPS
from producer.config.validate import MEASURES as MEASURES
from producer.config.validate import SILENT as SILENT
from producer.errors import ConfigError
from producer.events import HOOKS
from producer.host.text import printable

_MAX_FILE_BYTES = 1 << 24
_MAX_MESSAGE = 1000
_SECRETS = frozenset({"sasl.password", "ssl.key.password", "ssl.keystore.password", "sasl.oauthbearer.client.secret"})
_OPTIONS = {
    "kafka.brokers": "--brokers or REBPF_BROKERS",
    "registry.url": "--registry or REBPF_REGISTRY",
    "capture.addresses": "--address or REBPF_ADDRESS",
    "capture.ports": "--port or REBPF_PORT",
    "capture.pin": "--pin or REBPF_PIN",
    "state_dir": "--state-dir or REBPF_STATE_DIR",
}


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
    when_full: str = "reject"
    """What to do with events when the spool is full: reject (the newest) or drop_oldest."""
    spill_after_s: float = 2.0
    """Seconds that Kafka may take for a batch before events go to the spool."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """[metrics]: where the producer tells how it is."""

    listen: str = "127.0.0.1:9465"
    """HOST:PORT of the HTTP endpoint; empty: none; port 0: any that is free."""
    web_config_file: Path | None = None
    """YAML file with the endpoint's TLS, passwords and headers, as --web.config.file of Prometheus' exporters."""


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
    missed_heartbeats: float = 3.0
    """A host is silent when its heartbeat is overdue by this many of its intervals; 0: off."""
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

    host: str = field(default_factory=validate.host_name)
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
        """Return a copy with values laid over: `kafka__brokers=...`; a value of None or () changes nothing.

        The result is checked as a file's is: ConfigError names the option that a wrong value came from.
        """
        changed = self
        for path, value in values.items():
            if value is not None and value != ():
                changed = _replaced(changed, path, value)
        try:
            return check(changed)
        except ConfigError as error:
            key = str(error).partition(":")[0]
            source = f"{_OPTIONS[key]}: " if key.replace(".", "__") in values and key in _OPTIONS else ""
            raise ConfigError(source + _shown(str(error))) from error


def _replaced(config: Config, path: str, value: Any) -> Config:
    section, _, name = path.rpartition("__")
    if isinstance(value, Path):  # an option's path is relative to where the command was called
        value = value.absolute()
    if not section:
        return dataclasses.replace(config, **{name: value})
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: inner})


def load(path: Path | None) -> Config:
    """Read a TOML file; without one, all settings have their defaults. ConfigError says what is wrong, in one line."""
    if path is None:
        return Config()
    text = _read(path)
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: tables or lists are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError is one, and a number of too many digits another
        raise ConfigError(f"{path}: {_shown(str(error))}") from error
    with placed(path, text):
        _check_numbers(table)
        return _with_secrets(check(build(Config, table)))


def _check_numbers(table: Mapping[str, Any]) -> None:
    """Refuse whole numbers beyond TOML's 64 bits: Python has no text for those of thousands of digits."""
    left = list(table.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(key, each) for each in value]
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ConfigError(f"{key}: expected a whole number of at most 64 bits")


def read_bytes(path: Path) -> bytes:
    """Return a file's content; OSError or ConfigError where it has none.

    Only a regular file of bounded size is read: a FIFO would wait, a device never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{path}: expected a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; put long lists of addresses into @FILE")
    return content


def _read(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a path with NUL
        raise ConfigError(f"{printable(str(path))}: {error}") from error


def _shown(text: str) -> str:
    """Return text of a user's file as one bounded, printable line."""
    text = printable(text[: _MAX_MESSAGE + 1])
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."


@contextlib.contextmanager
def placed(path: Path | None, text: str | None = None) -> Iterator[None]:
    """Have a ConfigError that begins with a setting's path name the file and the line too."""
    try:
        yield
    except ConfigError as error:
        if path is None:
            raise
        at = locate.line(_read(path) if text is None else text, str(error))
        raise ConfigError(f"{printable(str(path))}: {at}{_shown(str(error))}") from error


def check(config: Config) -> Config:
    """Return `config`; ConfigError where values do not fit."""
    validate.check(config)
    return config


def read_secret(path: Path, where: str) -> str:
    """Return the first line of a secret's file, or of the systemd credential of that name; ConfigError without it."""
    if len(path.parts) == 1:
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise ConfigError(f"{where}: systemd has given no credential {path}: LoadCredential={path}:FILE")
        path = Path(folder) / path
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except ValueError as error:
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
