"""The commands `rebpf spool ...`."""

from dataclasses import asdict
from pathlib import Path

import click

from producer.cli.options import (
    Group,
    Number,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    quarantine_option,
    state_dir_option,
    usage,
)
from producer.errors import UnavailableError
from producer.host.output import echo
from producer.host.signals import stop_on_signals
from producer.host.text import lines, printable, to_json


@click.group(cls=Group)
def spool() -> None:
    """Show, send or discard the events spooled on disk."""


@spool.command("show", examples=(("rebpf spool show --json", "List what is spooled, as JSON"),))
@config_option
@state_dir_option
@json_option
def spool_show(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Show spooled events and messages that Kafka rejected.

    Works while a producer is running, too.
    """
    from producer.commands import spool_show

    settings = load(config, secrets=False, state_dir=state_dir)
    found = spool_show.spooled(settings)
    if as_json:
        echo(to_json({topic: asdict(each) for topic, each in (found or {}).items()}))
    elif found is None:
        echo(printable(f"no state folder {settings.state_dir}: nothing is spooled"))
    else:
        echo(lines(f"{topic} {each}" for topic, each in found.items()))


@spool.command("verify", examples=(("rebpf spool verify", "Read every spool file of this host"),))
@config_option
@state_dir_option
@json_option
def spool_verify(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Check the spool files for damage. Exits with 65 if any is found."""
    from producer.commands import spool_show
    from producer.errors import IncompleteError

    found = spool_show.verify(load(config, secrets=False, state_dir=state_dir))
    if as_json:
        echo(to_json({name: each.as_dict() for name, each in found.items()}))
    else:
        echo("\n".join(f"{printable(name)} {each}" for name, each in found.items()))
    if complaint := spool_show.complaint(found):
        raise IncompleteError(complaint)


@spool.command(
    "replay",
    examples=(("rebpf spool replay --brokers kafka-1:9092", "Empty the spool of a host that is being decommissioned"),),
)
@config_option
@brokers_option
@state_dir_option
@quarantine_option
@option(
    "--timeout",
    type=Number(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Stop when Kafka has acknowledged nothing for this many seconds.",
)
@json_option
def spool_replay(
    config: Path | None, brokers: str | None, state_dir: Path | None, quarantine: bool, timeout: float, as_json: bool
) -> None:
    """Send the spooled events while no producer is running.

    Exits with 69 if events remain in the spool, and with 65 if any were lost.
    """
    from producer.commands import spool_replay
    from producer.errors import IncompleteError

    settings = load(config, brokers=brokers, state_dir=state_dir)
    if settings.kafka.brokers is None:
        usage("spool replay needs --brokers")
    sent = spool_replay.replay(settings, stop_on_signals(), timeout_s=timeout, quarantine=quarantine)
    if as_json:
        echo(to_json({topic: asdict(each) for topic, each in sent.items()}))
    else:
        echo(lines(f"{topic} {each}" for topic, each in sent.items()))
    waiting, lost = spool_replay.complaint(sent)
    if waiting:
        raise UnavailableError(waiting)
    if lost:
        raise IncompleteError(lost)


@spool.command("drop", examples=(("rebpf spool drop --quarantine --yes", "Delete the rejected messages"),))
@config_option
@state_dir_option
@quarantine_option
@click.option("--yes", is_flag=True, help="Confirm. Deleted events cannot be recovered.")
@json_option
def spool_drop(config: Path | None, state_dir: Path | None, quarantine: bool, yes: bool, as_json: bool) -> None:
    """Discard the spooled events while no producer is running.

    The balance counts them as lost.
    """
    from producer.commands import spool_replay

    if not yes:
        usage("spool drop deletes events, which cannot be recovered: confirm with --yes")
    settings = load(config, secrets=False, state_dir=state_dir)
    dropped = spool_replay.drop_quarantine(settings) if quarantine else spool_replay.drop(settings)
    if as_json:
        echo(to_json({topic: {"dropped": count} for topic, count in dropped.items()}))
    else:
        echo(lines(f"{topic} dropped={count}" for topic, count in dropped.items()))
