"""The command `rebpf alert`."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

import click

from producer.cli.options import (
    Command,
    Number,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    registry_option,
    usage,
)
from producer.host.output import echo
from producer.host.signals import stop_on_signals

logger = logging.getLogger(__name__)

_HANGS_AFTER_S = 60.0
"""Kafka may take 10 s for each of a few answers."""


@click.command(
    cls=Command,
    examples=(
        ("rebpf alert --config /etc/rebpf/alert.toml --brokers kafka-1:9092", "Apply the file's [[alert.rules]]"),
    ),
)
@config_option
@brokers_option
@registry_option
@option("--duration", type=Number(min=0), help="Stop after this many seconds.")
@option("--from-beginning", is_flag=True, help="If the group has no committed offsets, start from the earliest event.")
@option("--flink-sql", is_flag=True, help="Print the rules as a Flink SQL job, and exit.")
@json_option
def alert(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    duration: float | None,
    from_beginning: bool,
    flink_sql: bool,
    as_json: bool,
) -> None:
    """Send alerts when a rule's threshold is crossed.

    Start it more than once with the same configuration: one member is active, the others are standbys.
    """
    from producer.alert.flink import job
    from producer.alert.member import Member
    from producer.alert.sinks import open_sinks
    from producer.alert.status import registry as metrics
    from producer.consume.reader import collect_rarely
    from producer.health.board import StatusBoard
    from producer.health.endpoint import Endpoint
    from producer.health.web_config import WebSettings
    from producer.host import endpoints

    collect_rarely()
    settings = load(config, secrets=not flink_sql, brokers=brokers, registry=registry)
    where = settings.kafka.brokers
    if where is None:
        usage("alert needs --brokers")
    if flink_sql:
        echo(job(settings, 0 if from_beginning else time.time_ns()))
        return
    stop = stop_on_signals()
    board = StatusBoard(hangs_after_s=_HANGS_AFTER_S)
    member = Member(
        settings,
        where,
        lambda wait: open_sinks(settings, where, wait, as_json=as_json, stop=stop),
        stop,
        board,
        from_beginning=from_beginning,
    )
    with ExitStack() as stack:
        if settings.alert.listen:
            host, port = endpoints.split(settings.alert.listen)
            web = WebSettings(settings.metrics.web_config_file)
            endpoint = stack.enter_context(Endpoint(host, port, board, web, registry=metrics(board.last)))
            logger.info("endpoint url=%s", endpoint.url)
        member.run(duration)
    logger.info("stopped %s", member.counts)
