"""`rebpf check`: the settings."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from producer.commands.finding import Finding
from producer.config.effective import digest
from producer.config.librdkafka import TEST_BROKER
from producer.config.load import Config, located
from producer.errors import ConfigError, RebpfError
from producer.health.web_config import WebSettings
from producer.host import capabilities
from producer.host.cgroups import cgroup2_root
from producer.kafka.librdkafka import Producer
from producer.kafka.sink import producer_settings
from producer.registry.client import RegistryClient
from producer.rules.resolve import resolve, resolve_offline

SERVICE_USER = "rebpf"
"""Of deploy/systemd/rebpf.service."""
_NO_NAMES = frozenset({"", "(none)", "localhost", "localhost.localdomain"})
"""Host names of hosts that were given none."""


def settings(config: Config, path: Path | None = None) -> Iterator[Finding]:
    """Check the settings as `rebpf run` does before it uses the kernel or a server."""
    for subject, use in (
        ("kafka.settings", _create_client),
        ("registry", _create_registry_client),
        ("metrics.web_config_file", _read_web_config),
        ("rules", _compile_rules),
    ):
        try:
            with located(path):
                found = use(config)
        except RebpfError as error:
            yield Finding(subject, str(error), error.exit_code)
        else:
            if found:
                yield Finding(subject, found)
    yield from _absent_names(config)
    if config.host in _NO_NAMES:
        text = f'events have the name "{config.host}", as those of other hosts without one: set host, or name this host'
        yield Finding("host", text, warns=True)


def _create_client(config: Config) -> str:
    """Create Kafka's client as in `run`, but without the brokers, so that it does not connect."""
    client = producer_settings(config.kafka.brokers, config.kafka.settings)
    brokers = {"bootstrap.servers", *TEST_BROKER}
    # Root's producer has dropped its capabilities by then, and so reads only files that root may read without them.
    with contextlib.nullcontext() if is_of_service(config.state_dir) else capabilities.set_aside():
        Producer({name: value for name, value in client.items() if name not in brokers}).close()
    return ""


def is_of_service(state_dir: Path) -> bool:
    """Whether the folder belongs to the service's user, for whom root checks the host."""
    try:
        return state_dir.owner() == SERVICE_USER
    except (OSError, KeyError):  # no such folder or user
        return False


def _create_registry_client(config: Config) -> str:
    if config.registry.url is not None:
        RegistryClient(config.registry)
    return ""


def _read_web_config(config: Config) -> str:
    WebSettings(config.metrics.web_config_file)
    return ""


def _compile_rules(config: Config) -> str:
    ruleset = resolve(config, cgroup2_root())
    ruleset.tables()
    if config.rules:
        return f"{len(config.rules)}"
    if ruleset.rules:
        return "none: only capture.addresses and capture.ports are captured"
    return f"none: {'all' if ruleset.default.transmit else 'by capture.default, no'} segments are captured"


def _absent_names(config: Config) -> Iterator[Finding]:
    with contextlib.suppress(RebpfError):  # reported above
        for text in resolve(config, cgroup2_root()).absent:
            yield Finding("rules", text, warns=True)


def settings_offline(config: Config, path: Path | None) -> list[Finding]:
    """Check all that does not depend on this host: neither files, users, interfaces nor servers that are named."""
    try:
        with located(path):
            client = producer_settings("offline:9092", config.kafka.settings)
            # Creating a client also finds values that contradict each other, but would open keys and fetch tokens.
            named = ("bootstrap.", "ssl.", "sasl.", "https.", "security.", "enable.sasl", "enable.ssl")
            Producer({name: value for name, value in client.items() if not name.startswith(named)}).close()
            resolve_offline(config).tables()
    except RebpfError as error:
        return [Finding("configuration", str(error), ConfigError.exit_code)]
    return [Finding("configuration", f"valid, hash {digest(config)}")]
