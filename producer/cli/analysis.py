"""The commands `rebpf export` and `rebpf report`, which need the extra `rebpf[report]`."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from producer.cli.options import (
    Command,
    FilePath,
    Time,
    brokers_option,
    config_option,
    load,
    option,
    registry_option,
    require_packages,
    usage,
)
from producer.host.output import echo
from producer.host.signals import hangup
from producer.host.text import lines

paths_argument = click.argument("paths", nargs=-1, metavar="[FILE...]", type=FilePath())
since_option = option("--since", type=Time(), help="Start of the period: 2026-11-29T15:00Z, or 1h for an hour ago.")
filter_option = option(
    "--filter", "filter_text", metavar="FILTER", help="Only matching events: 'host web-17 and cause rto'."
)
until_option = option("--until", type=Time(), help="End of the period, in the same form.")


def _source(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    paths: Sequence[Path],
    period: Any,
    names: Sequence[str],
) -> Any:
    """Return the files, or else the topics of the given streams that exist."""
    from producer.export.read import STREAMS
    from producer.export.sources import Files, Topics
    from producer.topics import topic as topic_of

    settings = load(config, brokers=brokers, registry=registry)
    if paths:
        # REBPF_BROKERS of a shell is for other commands.
        if click.get_current_context().get_parameter_source("brokers") is ParameterSource.COMMANDLINE:
            usage("give either files or --brokers")
        return Files(paths)
    if settings.kafka.brokers is None:
        usage("give files, or --brokers")
    return Topics(
        settings.kafka.brokers,
        {STREAMS[name]: topic_of(settings, STREAMS[name]) for name in names},
        settings.registry,
        settings.kafka.settings,
        period.since_ns,
    )


def _clean_up_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the command as SIGINT does, so that no partial files stay."""
    for number in (signal.SIGTERM, *hangup()):
        signal.signal(number, signal.default_int_handler)


def _filter(text: str | None) -> Any:
    from producer.export.events import matching

    return matching(text) if text else None


@click.command(
    cls=Command,
    examples=(
        ("rebpf export --brokers kafka-1:9092 --since 24h -o events", "Write a day of a fleet's events as Parquet"),
        ("rebpf export /var/lib/rebpf/spool -o events --format csv", "Write what is spooled on a host as CSV"),
    ),
)
@paths_argument
@config_option
@brokers_option
@registry_option
@option("--output", "-o", type=FilePath(), required=True, help="Folder to write to.")
@option(
    "--topic",
    type=click.Choice(["tcp_flow", "tcp_retransmit", "tcp_transmit"]),
    multiple=True,
    help="Export this topic only, named without prefix; repeatable.",
)
@option("--format", "form", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True, help="Format.")
@since_option
@until_option
@filter_option
def export(
    paths: tuple[Path, ...],
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    output: Path,
    topic: tuple[str, ...],
    form: str,
    since: int | None,
    until: int | None,
    filter_text: str | None,
) -> None:
    """Write events to Parquet or CSV files, partitioned by day.

    Reads the topics, or files and folders of files: those of the spool, of `rebpf trace -w` or of another export.
    Writes OUTPUT/TOPIC/date=DAY/SINCE-UNTIL.parquet, so repeating an export replaces its files. Needs `rebpf[report]`.
    """
    require_packages("export", "pyarrow")
    from producer.commands.export import export as write
    from producer.consume.period import Period
    from producer.consume.reader import collect_rarely
    from producer.export.read import STREAMS
    from producer.export.sources import undecodable

    collect_rarely()
    _clean_up_on_signals()
    period = Period(since, until)
    names = topic or tuple(STREAMS)
    source = _source(config, brokers, registry, paths, period, names)
    written = write(source, output, form, period, frozenset(STREAMS[name] for name in names), _filter(filter_text))
    echo(lines(f"{path} events={count}" for path, count in written.items()))
    if complaint := undecodable(source):
        echo(complaint, err=True)


@click.command(
    cls=Command,
    examples=(
        ("rebpf report --brokers kafka-1:9092 --since 1h -o report.html", "Show what a fleet retransmitted in an hour"),
        ("rebpf report events.avro -o report.html --png report.png", "The same from a file, also as a picture"),
    ),
)
@paths_argument
@config_option
@brokers_option
@registry_option
@option("--output", "-o", type=FilePath(), required=True, help="HTML file to write.")
@option("--png", type=FilePath(), help="Also write a picture to this file.")
@since_option
@until_option
@filter_option
def report(
    paths: tuple[Path, ...],
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    output: Path,
    png: Path | None,
    since: int | None,
    until: int | None,
    filter_text: str | None,
) -> None:
    """Write a report with plots: what was retransmitted, where and why.

    The HTML file needs no network. Reads the topics, or files as `rebpf export` does. Needs `rebpf[report]`.
    """
    require_packages("report", "pyarrow", "matplotlib")
    os.environ["MPLBACKEND"] = "agg"  # of a user's notebooks; matplotlib does not start with an unknown one
    from producer.commands.report import report as write
    from producer.consume.period import Period
    from producer.consume.reader import collect_rarely
    from producer.export.read import STREAMS
    from producer.report.connections import MARGIN_NS

    collect_rarely()
    _clean_up_on_signals()
    period = Period(since, until)
    earlier = Period(period.since_ns and period.since_ns - MARGIN_NS, period.until_ns)
    source = _source(config, brokers, registry, paths, earlier, tuple(STREAMS))
    given = {"--config": config, "--brokers": brokers, "--registry": registry}
    options = [part for name, value in given.items() if value and not paths for part in (name, str(value))]
    matches = _filter(filter_text)
    headline = write(source, period, output, png, matches=matches, filter_text=filter_text or "", options=options)
    echo(lines(headline))
    echo(lines(f"wrote {path}" for path in (output, png) if path is not None))
