"""The configuration: all settings with their defaults, and the TOML file that sets them.

The command line (producer.cli) puts environment variables and options over the file. Each setting is a field of a
frozen dataclass. An unknown key is an error that suggests the nearest known one.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer.config import sources, validate
from producer.config.alerts import Alert as Alert
from producer.config.alerts import AlertRule as AlertRule
from producer.config.convert import Address, build
from producer.config.librdkafka import FILES
from producer.config.sources import read_bytes, shown, stamps
from producer.errors import ConfigError
from producer.events import HOOKS, STREAMS, Stream

_SECRETS = frozenset({"sasl.password", "ssl.key.password", "ssl.keystore.password", "sasl.oauthbearer.client.secret"})
MOST_RULES = 1024
_OPTIONS = {
    "kafka.brokers": "--brokers or REBPF_BROKERS",
    "registry.url": "--registry or REBPF_REGISTRY",
    "kubernetes.pods_url": "--pods-url or REBPF_PODS_URL",
    "capture.addresses": "--address or REBPF_ADDRESS",
    "capture.ports": "--port or REBPF_PORT",
    "capture.pin": "--pin or REBPF_PIN",
    "state_dir": "--state-dir or REBPF_STATE_DIR",
}


@dataclass(frozen=True, slots=True)
class Capture:
    """[capture]: what to capture, and how."""

    hooks: tuple[str, ...] = HOOKS
    """Hooks to choose from; the best one that the kernel allows is used."""
    addresses: tuple[Address, ...] = ()
    """Capture only segments from or to one of these addresses; empty: all."""
    ports: tuple[int, ...] = ()
    """Capture only segments from or to one of these ports; empty: all."""
    default: str = "keep"
    """Action for segments that no rule matches: keep or drop."""
    transmit: bool = True
    """Capture and publish transmits."""
    retransmit: bool = True
    """Capture and publish retransmissions."""
    flow: bool = True
    """Capture and publish records of connections."""
    flow_interval_s: float = 10.0
    """Seconds between two records of an open connection. Each connection has another one when it closes."""
    transmit_ring_bytes: int = 1 << 24
    """Size of the ring for transmits in bytes, a power of two. An event takes 216 bytes."""
    retransmit_ring_bytes: int = 1 << 22
    """Size of the ring for retransmissions in bytes, a power of two."""
    flow_ring_bytes: int = 1 << 22
    """Size of the ring for records of connections in bytes, a power of two. A record takes 344 bytes."""
    pin: Path | None = None
    """Folder in a bpffs, below /sys/fs/bpf, that keeps rings and hooks across a crash, if systemd does not."""
    latency_s: float = 1.0
    """Maximum seconds between two reads of a ring, unless Kafka takes longer to acknowledge events from it. Busy rings
    are read more often."""
    retransmit_at_once: bool = True
    """Read retransmissions at once, mostly within 20 ms; otherwise within latency_s, for less CPU."""
    transmit_events_per_s: int = 0
    """Budget for transmits: above it, connections are sampled (sample_rate in the events); 0: no budget."""
    btf: Path | None = None
    """BTF file with the kernel's struct layouts; none: /sys/kernel/btf/vmlinux."""
    programs: Path | None = None
    """File of `rebpf compile`, or folder with such files; one that fits the kernel is used instead of the compiler."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams to capture."""
        return tuple(stream for stream in STREAMS if getattr(self, stream.name))


@dataclass(frozen=True, slots=True)
class Kafka:
    """[kafka]: where to publish events."""

    brokers: str | None = None
    """Bootstrap servers, HOST:PORT[,HOST:PORT...]; none: an in-process test broker."""
    topic_prefix: str = ""
    """Prefix of the topic names."""
    key: str = "host"
    """Message key of events, which determines the partition: host (its name), or flow (saddr:sport>daddr:dport)."""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Settings for librdkafka, by its names. Secrets can be "@FILE", or "@NAME" for a systemd credential."""
    stop_timeout_s: float = 10.0
    """Seconds to wait for messages in flight when stopping."""


@dataclass(frozen=True, slots=True)
class Topics:
    """[topics]: Kafka's own settings for the topics that `rebpf init` creates. They override its defaults."""

    transmit: Mapping[str, str] = field(default_factory=dict)
    """Settings of tcp_transmit. Default: kept for 1 day ("retention.ms"), compressed as the producers send."""
    retransmit: Mapping[str, str] = field(default_factory=dict)
    """Settings of tcp_retransmit. Default: kept for 30 days, "compression.type" zstd."""
    flow: Mapping[str, str] = field(default_factory=dict)
    """Settings of tcp_flow. Default: as tcp_retransmit."""
    heartbeat: Mapping[str, str] = field(default_factory=dict)
    """Settings of rebpf_agent. Default: kept for 7 days, compressed as the producers send."""


@dataclass(frozen=True, slots=True)
class Spool:
    """[spool]: disk space for events while Kafka is unavailable."""

    transmit_bytes: int = 1 << 30
    """Maximum bytes on disk for transmits; 0: no spool. An event takes 17 to 86 bytes."""
    retransmit_bytes: int = 1 << 28
    """Maximum bytes on disk for retransmissions; 0: no spool."""
    flow_bytes: int = 1 << 28
    """Maximum bytes on disk for records of connections; 0: no spool."""
    max_age_s: float = 7 * 86400.0
    """Age in seconds at which spooled events are discarded."""
    quarantine_bytes: int = 1 << 26
    """Maximum bytes on disk per stream for messages that Kafka rejected; 0: they are not kept."""
    when_full: str = "reject"
    """What to do with events when the spool is full: reject (the newest) or drop_oldest."""
    spill_after_s: float = 2.0
    """Seconds without an acknowledgement after which events are spooled."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """[metrics]: the HTTP endpoint for metrics, health and status."""

    listen: str = "127.0.0.1:9465"
    """HOST:PORT to listen on; empty: no endpoint; port 0: any free port."""
    web_config_file: Path | None = None
    """YAML file with TLS, passwords and headers, in the format of --web.config.file of Prometheus exporters."""


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """[kubernetes]: names of pods in the events."""

    pods_url: str | None = None
    """URL of the list of this node's pods, from the API server or the kubelet; none: events have only pod_uid."""
    token: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    """File with the bearer token, which is sent over https only."""
    ca: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    """File with the CA certificate."""


@dataclass(frozen=True, slots=True)
class Registry:
    """[registry]: the schema registry."""

    url: str | None = None
    """URL, Confluent-compatible; none: schema ids 1 (transmit), 2 (retransmit), 3 (heartbeat), 4 (alerts), 5 (flow)."""
    register: bool = False
    """Register the schemas at start; otherwise `rebpf init` registers them, and a start looks them up."""
    timeout_s: float = 5.0
    """Timeout of a request in seconds."""
    auth: Path | None = None
    """File with USER:PASSWORD for basic authentication; a name without a slash is a systemd credential."""
    ca: Path | None = None
    """File or folder with CA certificates; none: those of certifi."""
    certificate: Path | None = None
    """File with the client certificate; none: no client certificate."""
    key: Path | None = None
    """File with the certificate's private key; none: it is in the file of the certificate."""


@dataclass(frozen=True, slots=True)
class RuleConfig:
    """[[rules]]: the first rule that matches a segment decides. One value of each condition must match."""

    name: str = ""
    """Name in messages and in `rebpf check --explain`."""
    action: str = "keep"
    """keep or drop, for all streams."""
    transmit: str | None = None
    """keep or drop, for transmits; none: as action."""
    retransmit: str | None = None
    """keep or drop, for retransmissions; none: as action."""
    flow: str | None = None
    """keep or drop, for records of connections; none: as action."""
    sample: int = 1
    """Capture one in N transmits; the field sample_rate of the events is N."""
    sample_by: str = "connection"
    """connection: all events of a connection or none; event: each event on its own."""
    sample_retransmits: bool = False
    """Sample retransmissions, too."""
    address: tuple[str, ...] = ()
    """Local or remote addresses or networks; "@FILE" reads them from a file, one per line."""
    local_address: tuple[str, ...] = ()
    """As above, local only."""
    remote_address: tuple[str, ...] = ()
    """As above, remote only."""
    port: tuple[int | str, ...] = ()
    """Local or remote ports, or ranges such as "8000-8999"."""
    local_port: tuple[int | str, ...] = ()
    """As above, local only."""
    remote_port: tuple[int | str, ...] = ()
    """As above, remote only."""
    netns: tuple[int | str, ...] = ()
    """Network namespaces: inode numbers, or names in /run/netns."""
    cgroup: tuple[str, ...] = ()
    """Cgroups by their path below the cgroup v2 root, including all below them."""
    unit: tuple[str, ...] = ()
    """systemd units, including all cgroups below them."""
    uid: tuple[int | str, ...] = ()
    """Owner of the socket: user ids or names."""
    interface: tuple[int | str, ...] = ()
    """Outgoing interfaces, by name or index; only with the hook cgroup_skb."""
    state: tuple[str, ...] = ()
    """TCP states of the socket."""


@dataclass(frozen=True, slots=True)
class Config:
    """All settings."""

    host: str = field(default_factory=validate.host_name)
    """Host name in the events."""
    state_dir: Path = Path("/var/lib/rebpf")
    """Folder for the spool, quarantine, ledger, compiled programs, agent.json and the lock."""
    log_level: str = "info"
    """Lowest level that `rebpf run` logs: debug, info, warning or error. The option --log-level overrides it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """[labels]: at most 16 labels of the site, such as env or dc, in each event, heartbeat and status."""
    reload_when_changed: bool = False
    """Reload when a file of the configuration has changed; otherwise only at SIGHUP."""
    capture: Capture = Capture()
    kafka: Kafka = Kafka()
    topics: Topics = Topics()
    spool: Spool = Spool()
    metrics: Metrics = Metrics()
    kubernetes: Kubernetes = Kubernetes()
    registry: Registry = Registry()
    alert: Alert = field(default_factory=Alert)
    rules: tuple[RuleConfig, ...] = ()

    def with_values(self, **values: Any) -> "Config":
        """Return a copy with settings replaced: `kafka__brokers=...`; None and () change nothing.

        The result is checked like a file. ConfigError names the option of a wrong value.
        """
        changed = self
        try:
            for path, value in values.items():
                if value is not None and value != ():
                    path = path.replace("__", ".")
                    changed = replaced(changed, path, _absolute(path, value) if isinstance(value, Path) else value)
            validate.check(changed)
            return changed
        except ConfigError as error:
            key = str(error).partition(":")[0]
            source = f"{_OPTIONS[key]}: " if key.replace(".", "__") in values and key in _OPTIONS else ""
            raise ConfigError(source + shown(str(error))) from error


def replaced(config: Config, path: str, value: Any) -> Config:
    """Return a copy with another value of the setting at a path: `kafka.brokers`."""
    section, _, name = path.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: inner})


def _absolute(key: str, path: Path) -> Path:
    """Return an option's path, which is relative to the working directory."""
    try:
        return path.absolute()
    except OSError as error:
        raise ConfigError(f"{key}: {path}: the working directory no longer exists: {error.strerror}") from error


def load(path: Path | None, *, secrets: bool = True) -> Config:
    """Read the file and conf.d beside it, or return the defaults if `path` is None. ConfigError has the location.

    Without `secrets`, those that are in files stay "@FILE", for commands that do not connect.
    """
    if path is None:
        return Config()
    files = sources.read(path)
    try:
        _check_numbers(files.table)
        _check_rules(files.table.get("rules"))
        config: Config = build(Config, files.table)
        validate.check(config)
        return _with_secrets(config) if secrets else config
    except ConfigError as error:
        raise ConfigError(files.message(error)) from error


def _check_numbers(table: Mapping[str, Any]) -> None:
    """Reject integers of more than 64 bits: Python cannot print those of thousands of digits."""
    pending = list(table.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            pending += [(key, each) for each in value]
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ConfigError(f"{key}: expected an integer of at most 64 bits")


def _check_rules(rules: Any) -> None:
    """Reject too many rules before work is done for each: a reload must not keep the producer from its events."""
    if isinstance(rules, list) and len(rules) > MOST_RULES:
        raise ConfigError(f"rules: too many rules: {len(rules)}, at most {MOST_RULES}")


@contextlib.contextmanager
def located(path: Path | None) -> Iterator[None]:
    """Add the file and the line to a ConfigError that begins with the path of a setting that a file has."""
    try:
        yield
    except ConfigError as error:
        if path is None or not (files := sources.read(path)).has(error):
            raise
        raise ConfigError(files.message(error)) from error


class Secret(str):
    """A secret of the Kafka client, and the file that it was read from."""

    path: Path


def read_secret(path: Path, where: str) -> Secret:
    """Return the first line of a file, or of the systemd credential of that name. Raises ConfigError."""
    if len(path.parts) == 1:
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise ConfigError(f"{where}: no systemd credential {path}: set LoadCredential={path}:FILE in the unit")
        path = Path(folder) / path
    try:
        secret = read_bytes(path).decode("utf-8-sig").partition("\n")[0].removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {path}: not UTF-8") from error  # without the bytes of the secret
    if not secret:
        raise ConfigError(f"{where}: {path}: expected a secret in the first line, found none")
    if "\0" in secret:  # libraries would cut it there
        raise ConfigError(f"{where}: {path}: expected a secret without NUL")
    found = Secret(secret)
    found.path = path
    return found


def read_again(settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings of the Kafka client with the secrets that their files have now, if they can be read."""
    return {name: _newest(value) if isinstance(value, Secret) else value for name, value in settings.items()}


def _newest(secret: Secret) -> Secret:
    try:
        return read_secret(secret.path, "")
    except ConfigError:  # being replaced, deleted after the start, or unreadable without root's capabilities
        return secret


def client_files(settings: Mapping[str, str]) -> tuple[object, ...]:
    """Return what differs once a certificate or a key of the Kafka client has been replaced."""
    return stamps(Path(settings[name]) for name in sorted(settings.keys() & FILES))


def is_renewed(settings: Mapping[str, str], files: tuple[object, ...]) -> bool:
    """Return whether a secret is another one now, or `client_files` returns something else than `files`."""
    return read_again(settings) != settings or client_files(settings) != files


def _with_secrets(config: Config) -> Config:
    """Return `config` with each "@FILE" secret of the Kafka client replaced by its content."""
    settings = {
        name: read_secret(Path(value[1:]), f"kafka.settings.{name}") if name in _SECRETS and value[:1] == "@" else value
        for name, value in config.kafka.settings.items()
    }
    return config.with_values(kafka__settings=settings)
