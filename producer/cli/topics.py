"""The commands `rebpf init`, `rebpf tail` and `rebpf verify`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from producer.cli.options import (
    Command,
    Offset,
    Time,
    TopicName,
    Whole,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    registry_option,
    state_dir_option,
    usage,
)
from producer.cli.view import has_color, is_terminal, line_width
from producer.host.output import echo
from producer.host.signals import stop_on_signals
from producer.host.text import lines


@click.command(
    cls=Command,
    examples=(
        ("rebpf init --brokers kafka-1:9092 --partitions 12 --replication 3", "Set up the topics of a fleet, once"),
    ),
)
@config_option
@brokers_option
@registry_option
@option("--partitions", type=Whole(min=1), default=6, show_default=True, help="Partitions per event topic.")
@option("--replication", type=Whole(min=1), default=1, show_default=True, help="Replicas per partition.")
@option("--alerts", is_flag=True, help="Also create the topic and schema of `rebpf alert`.")
def init(
    config: Path | None, brokers: str | None, registry: str | None, partitions: int, replication: int, alerts: bool
) -> None:
    """Create the topics and register the schemas.

    Leaves existing topics as they are.
    """
    from producer.commands.init import create_topics, register_schemas

    settings = load(config, brokers=brokers, registry=registry)
    if settings.kafka.brokers is None:
        usage("init needs --brokers")
    done = create_topics(settings, partitions, replication, alerts=alerts)
    done += register_schemas(settings, alerts=alerts)
    echo(lines(done))


@click.command(
    cls=Command,
    examples=(
        ("rebpf tail", "Show the events of the producer on this host"),
        ("rebpf tail --brokers kafka-1:9092 --topic tcp_retransmit -n 100", "Show the next 100 retransmissions"),
        ("rebpf tail --brokers kafka-1:9092 --since 1h --until 30m 'cause rto'", "Show past timeouts"),
    ),
)
@config_option
@brokers_option
@registry_option
@option("--topic", type=TopicName(), multiple=True, help="Read this topic only, named with its prefix; repeatable.")
@click.argument("filter_words", metavar="[FILTER]...", nargs=-1)
@click.option("-n", "limit", type=Whole(min=1), help="Stop after this many events.")
@option("--since", type=Time(), help="Show events from this time on: 2026-11-29T15:00Z, or 1h for an hour ago.")
@option("--until", type=Time(), help="Show the events before this time, then exit.")
@option("--from-beginning", is_flag=True, help="Start with the earliest event.")
@state_dir_option
@json_option
def tail(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    topic: tuple[str, ...],
    filter_words: tuple[str, ...],
    limit: int | None,
    since: int | None,
    until: int | None,
    from_beginning: bool,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Print events from the topics as they arrive.

    Without --brokers, reads from the brokers of the producer that runs on this host.
    """
    from producer.commands.tail import Chosen
    from producer.commands.tail import tail as tail_topics
    from producer.consume.period import Period
    from producer.host import state
    from producer.topics import topic as topic_of
    from producer.view.filter import parse

    chosen = Chosen(parse(" ".join(filter_words)) if filter_words else None, Period(since, until))
    settings = load(config, brokers=brokers, registry=registry, state_dir=state_dir)
    facts: dict[str, Any] = {"brokers": settings.kafka.brokers, "registry": settings.registry.url}
    if settings.kafka.brokers is None:
        facts = state.running(settings.state_dir) or usage(
            f"no producer is running with state_dir {settings.state_dir}: give --brokers, or start `rebpf run`"
        )
    tail_topics(
        facts["brokers"],
        topic or tuple(topic_of(settings, stream) for stream in settings.capture.streams),
        registry=replace(settings.registry, url=facts["registry"]),
        as_json=as_json,
        limit=limit,
        color=has_color(),
        from_beginning=from_beginning,
        stop=stop_on_signals(),
        client_settings=settings.kafka.settings,
        chosen=chosen,
        width=line_width(),
    )


@click.command(
    cls=Command,
    examples=(
        ("rebpf verify --brokers kafka-1:9092 --host web-17", "Check the events of one host"),
        ("rebpf verify --brokers kafka-1:9092 --since-offset -100000", "Check the latest 100,000 messages"),
    ),
)
@config_option
@brokers_option
@registry_option
@option("--topic", type=TopicName(), multiple=True, help="Read this topic only, named with its prefix; repeatable.")
@option("--host", help="Check the events of this host only.")
@option(
    "--since-offset",
    type=Offset(),
    default="beginning",
    show_default=True,
    help="First offset in each partition; a negative number counts from the end.",
)
@json_option
def verify(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    topic: tuple[str, ...],
    host: str | None,
    since_offset: int | None,
    as_json: bool,
) -> None:
    """Check the topics for missing, duplicate and reordered events.

    Reads each topic to its end. Exits with 65 if anything is wrong, and with 69 if there are no events of --host.
    """
    from producer.commands import verify as verifying
    from producer.consume.reader import collect_rarely
    from producer.errors import IncompleteError, UnavailableError
    from producer.topics import topic as topic_of

    settings = load(config, brokers=brokers, registry=registry)
    if settings.kafka.brokers is None:
        usage("verify needs --brokers")
    collect_rarely()
    reports = verifying.verify(
        settings.kafka.brokers,
        tuple(dict.fromkeys(topic)) or tuple(topic_of(settings, stream) for stream in settings.capture.streams),
        registry=settings.registry,
        host=host,
        since=since_offset,
        client_settings=settings.kafka.settings,
    )
    echo(verifying.show(reports, as_json=as_json, width=line_width() if is_terminal() else None))
    if complaint := verifying.fault_summary(reports):
        raise IncompleteError(complaint)
    if host is not None and not any(report.boots for report in reports):
        raise UnavailableError(f"no events of host {host}: run it without --host to see the hosts")
