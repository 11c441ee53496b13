"""The commands `rebpf trace` and `rebpf top`."""

import os
import shutil
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from producer.cli.options import (
    Command,
    FilePath,
    Number,
    Time,
    Whole,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    registry_option,
    require_packages,
    usage,
)
from producer.host.signals import stop_on_signals
from producer.host.text import printable

_CACHE = Path("/var/cache/rebpf")
"""Compiled programs. The producer's state folder is not used, because it may belong to another user."""
GROUPS = ("peer", "flow", "host", "unit", "container", "comm", "port", "subnet", "cause")
SORTS = ("retransmitted", "ratio", "segments", "srtt", "failed", "flows", "name")
"""That of producer.view.table, which is not imported for every command."""
_WINDOW_S = 10.0
_WIDE = 200
"""The width of lines that do not go to a terminal."""


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def line_width() -> int:
    """Return how wide lines may be."""
    return shutil.get_terminal_size().columns if is_terminal() else _WIDE


def has_color() -> bool:
    """Return whether standard output shows colors."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


filter_argument = click.argument("filter_words", metavar="[FILTER]...", nargs=-1)


@click.command(
    cls=Command,
    examples=(
        ("rebpf trace", "Show retransmissions and failed connections"),
        ("rebpf trace 'peer 10.2.0.0/16 and cause rto'", "Only timeouts to one network"),
        ("rebpf trace -c -n 100", "Show 100 events, then counts by connection"),
        ("rebpf trace -w night.avro", "Also write the records to a file"),
        ("rebpf trace -r night.avro -c unit nginx.service", "Replay a file, one unit only"),
    ),
)
@filter_argument
@config_option
@option("--transmit", is_flag=True, help="Also show each segment sent.")
@click.option("-n", "limit", type=Whole(min=1), help="Stop after this many events.")
@option("--counts", "-c", is_flag=True, help="At the end, print counts by connection, and what limits each.")
@option("--write", "-w", type=FilePath(dir_okay=False), help="Also write matching records to this file.")
@option("--since", type=Time(), help="With -r: start at this time: 2026-11-29T15:00Z, or 1h for an hour ago.")
@option("--until", type=Time(), help="With -r: end before this time.")
@option("--read", "-r", "replay", type=FilePath(dir_okay=False), help="Read this file instead: Avro or Parquet.")
@json_option
def trace(
    filter_words: tuple[str, ...],
    config: Path | None,
    transmit: bool,
    limit: int | None,
    counts: bool,
    write: Path | None,
    since: int | None,
    until: int | None,
    replay: Path | None,
    as_json: bool,
) -> None:
    """Show retransmissions and failed connections of this host.

    Needs root, but neither Kafka nor a running producer. Stop it with Ctrl-C. Filters resemble those of tcpdump.
    """
    from producer.commands import trace as tracing
    from producer.consume.period import Period
    from producer.events import FLOWS, RETRANSMITS, TRANSMITS
    from producer.view.file import RecordFile
    from producer.view.filter import parse
    from producer.view.line import Lines

    if replay is not None and (transmit or write is not None):
        usage("-r shows what is in the file: leave out --transmit and -w")
    if replay is None and (since, until) != (None, None):
        usage("--since and --until need -r FILE: without it, events are shown as they happen")
    if replay is not None and replay.suffix == ".parquet":
        require_packages("trace -r", "pyarrow")
    chosen = parse(" ".join(filter_words))
    width = line_width()
    lines = Lines(width, hosts=replay is not None and width > 100, color=has_color())
    output = tracing.Output(lines, as_json, limit, counts, width)
    # A flag would not end the wait for the other end of a pipe; the default actions of signals do.
    file = RecordFile(write) if write is not None else None
    stop = stop_on_signals() if replay is None or replay.is_file() else threading.Event()
    if replay is not None:
        source: Iterable[Any] = tracing.from_file(replay, Period(since, until), stop)
    else:
        settings = load(config)
        streams = (RETRANSMITS, FLOWS, *([TRANSMITS] if transmit else []))
        local = _of_this_host(streams, settings)
        source = tracing.live(local, stop)
    try:
        tracing.trace(source, chosen, output, stop, file)
    finally:
        if file is not None:
            file.close()


@click.command(
    cls=Command,
    examples=(
        ("rebpf top", "Show which peers of this host need retransmissions"),
        ("rebpf top --by unit 'port 443'", "Group by systemd unit, on one port only"),
        ("rebpf top --brokers kafka-1:9092 --by host", "Show a fleet, from the topics"),
        ("rebpf top --once --json --window 30", "Print one table for a script"),
    ),
)
@filter_argument
@config_option
@brokers_option
@registry_option
@option("--by", type=click.Choice(GROUPS), default=GROUPS[0], show_default=True, help="What a line stands for.")
@option("--sort", type=click.Choice(SORTS), default=SORTS[0], show_default=True, help="Sort by this column.")
@option("--window", type=Number(1, 60), help="Seconds that rates cover.  [default: 10; with --brokers 30]")
@option("--once", is_flag=True, help="Print the table of one window, then exit.")
@json_option
def top(
    filter_words: tuple[str, ...],
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    by: str,
    sort: str,
    window: float | None,
    once: bool,
    as_json: bool,
) -> None:
    """Show a live table of connections and retransmissions.

    Without --brokers, shows this host: needs root, but neither Kafka nor a running producer. Without a terminal, prints
    the table of one window.
    """
    from producer.commands import top as showing
    from producer.events import FLOWS, RETRANSMITS
    from producer.view.filter import parse
    from producer.view.keys import Choice
    from producer.view.terminal import is_usable
    from producer.view.topics import INTERVAL_S, WINDOW_S

    text = " ".join(filter_words)
    parse(text)
    if as_json and not once:
        usage("--json needs --once")
    window = window or (WINDOW_S if brokers else _WINDOW_S)
    if brokers and window < INTERVAL_S:
        least = f"expected at least {INTERVAL_S} with --brokers"
        usage(f"--window: {least}, since producers report open connections every {INTERVAL_S} s")
    stop = stop_on_signals()
    settings = load(config, brokers=brokers, registry=registry)
    source: showing.Source = _fleet(settings, stop) if brokers else _of_this_host((RETRANSMITS, FLOWS), settings)
    name = printable(brokers or settings.host)
    choice = Choice(by=by, sort=sort, filter_text=text)
    if once or not is_usable():
        showing.once(source, choice, window, name, stop, as_json=as_json, width=line_width())
    else:
        showing.watch(source, choice, window, name, stop, color=has_color())


def _of_this_host(streams: Sequence[Any], settings: Any) -> Any:
    from producer.view.local import LocalSource

    capture, fields = settings.capture, {"host": settings.host, "labels": dict(settings.labels)}
    return LocalSource(streams, fields, cache=_CACHE, btf=capture.btf, programs=capture.programs)


def _fleet(settings: Any, stop: Any) -> Any:
    from producer.events import FLOWS, RETRANSMITS
    from producer.topics import topic
    from producer.view.topics import TopicSource

    return TopicSource(
        settings.kafka.brokers,
        [topic(settings, stream) for stream in (RETRANSMITS, FLOWS)],
        registry=settings.registry,
        client_settings=settings.kafka.settings,
        stop=stop,
    )
