"""The command `rebpf alert`."""

import logging
from pathlib import Path

import click

from producer.cli.options import (
    Command,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    registry_option,
    usage,
)
from producer.host.signals import stop_on_signals

logger = logging.getLogger(__name__)


@click.command(
    cls=Command,
    examples=(
        ("rebpf alert --config /etc/rebpf/alert.toml --brokers kafka-1:9092", "Apply the file's [[alert.rules]]"),
    ),
)
@config_option
@brokers_option
@registry_option
@option("--duration", type=click.FloatRange(min=0), help="Stop after this many seconds.")
@option("--from-beginning", is_flag=True, help="If the group has no committed offsets, start from the earliest event.")
@json_option
def alert(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    duration: float | None,
    from_beginning: bool,
    as_json: bool,
) -> None:
    """Send alerts when a rule's threshold is crossed.

    Reads the topics as a member of a consumer group: start it more than once, and the members share the partitions.
    """
    from producer.alert.member import Member
    from producer.alert.sinks import open_sinks
    from producer.consume.reader import collect_rarely

    collect_rarely()
    settings = load(config).with_values(kafka__brokers=brokers, registry__url=registry)
    where = settings.kafka.brokers
    if where is None:
        usage("alert needs --brokers")
    stop = stop_on_signals()
    member = Member(
        settings,
        where,
        lambda wait: open_sinks(settings, where, wait, as_json=as_json, stop=stop),
        stop,
        from_beginning=from_beginning,
    )
    member.run(duration)
    logger.info("stopped %s", member.counts)
