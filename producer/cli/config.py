"""`rebpf config`: the effective configuration."""

from pathlib import Path
from typing import Any

import click

from producer.cli.options import (
    Command,
    address_option,
    brokers_option,
    config_option,
    json_option,
    load,
    pin_option,
    pods_url_option,
    port_option,
    registry_option,
    state_dir_option,
)
from producer.host.output import echo
from producer.host.text import lines, to_json


@click.command(
    cls=Command,
    examples=(
        ("rebpf config --config /etc/rebpf/rebpf.toml", "Print all settings, and where each comes from"),
        ("rebpf config --config rebpf.toml --json | jq -r .hash", "Print the hash that a host should report"),
    ),
)
@config_option
@brokers_option
@registry_option
@address_option
@port_option
@state_dir_option
@pin_option
@pods_url_option
@json_option
def config(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    address: tuple[Any, ...],
    port: tuple[int, ...],
    state_dir: Path | None,
    pin: Path | None,
    pods_url: str | None,
    as_json: bool,
) -> None:
    """Print the configuration that `rebpf run` would use.

    Takes the same options. Includes conf.d, the environment and defaults; each value that a file sets has the file and
    line beside it. Secrets are masked, and files with secrets are not read. The hash is that of heartbeats and metrics.
    """
    from producer.config import effective, sources
    from producer.config.load import load as load_files

    settings = load(config, secrets=False).with_values(
        kafka__brokers=brokers,
        registry__url=registry,
        capture__addresses=address,
        capture__ports=port,
        capture__pin=pin,
        kubernetes__pods_url=pods_url,
        state_dir=state_dir,
    )
    digest = effective.digest(settings)
    shown = effective.settings(settings)
    if as_json:
        echo(to_json({"hash": digest, "settings": shown}))
        return
    origins = sources.read(config).origins() if config else {}
    in_files = effective.settings(load_files(config, secrets=False))
    origins |= {path: "option or environment" for path, value in shown.items() if value != in_files.get(path)}
    echo(lines([f"# hash: {digest}", *effective.as_toml(settings, origins).splitlines()]))
