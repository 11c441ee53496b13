"""`rebpf config`: the effective configuration."""

from pathlib import Path
from typing import Any

import click

from producer.cli.options import Command, config_option, json_option, load, settings_options
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
@settings_options
@json_option
def config(config: Path | None, as_json: bool, **options: Any) -> None:
    """Print the configuration that `rebpf run` would use.

    Takes the same options. Includes conf.d, the environment and defaults, and shows the file and line of each value
    that a file sets. Secrets are masked, and files with secrets are not read. The hash is the one that heartbeats and
    metrics report.
    """
    from producer.config import effective, sources
    from producer.config.load import load as load_files

    settings = load(config, secrets=False, **options)
    digest = effective.digest(settings)
    shown = effective.settings(settings)
    if as_json:
        echo(to_json({"hash": digest, "settings": shown}))
        return
    origins = sources.read(config).origins() if config else {}
    in_files = effective.settings(load_files(config, secrets=False))
    origins |= {path: "option or environment" for path, value in shown.items() if value != in_files.get(path)}
    echo(lines([f"# hash: {digest}", *effective.as_toml(settings, origins).splitlines()]))
