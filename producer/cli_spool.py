"""The commands `rebpf spool ...`."""

from dataclasses import asdict
from pathlib import Path

import click

from producer.errors import UnavailableError
from producer.options import (
    Group,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    quarantine_option,
    state_dir_option,
    usage,
)
from producer.output import echo
from producer.signals import stop_on_signals
from producer.text import lines, printable, to_json


@click.group(cls=Group)
def spool() -> None:
    """What waits on disk for Kafka: look at it, send it without a capture, or give it up."""


@spool.command("show")
@config_option
@state_dir_option
@json_option
def spool_show(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Say what waits, and what Kafka has refused. A producer may be at work meanwhile."""
    from producer import spoolreport

    settings = load(config).with_values(state_dir=state_dir)
    found = spoolreport.look(settings)
    if as_json:
        echo(to_json({topic: asdict(each) for topic, each in (found or {}).items()}))
    elif found is None:
        echo(printable(f"there is no state folder {settings.state_dir}: nothing waits"))
    else:
        echo(lines(f"{topic} {each}" for topic, each in found.items()))


@spool.command("verify")
@config_option
@state_dir_option
@json_option
def spool_verify(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Read all that waits, and say what is damaged. Exits with 65 if anything is."""
    from producer import spoolreport
    from producer.errors import IncompleteError

    found = spoolreport.verify(load(config).with_values(state_dir=state_dir))
    if as_json:
        echo(to_json({name: each.as_dict() for name, each in found.items()}))
    else:
        echo("\n".join(f"{printable(name)} {each}" for name, each in found.items()))
    if complaint := spoolreport.complaint(found):
        raise IncompleteError(complaint)


@spool.command("replay")
@config_option
@brokers_option
@state_dir_option
@quarantine_option
@option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Give up when Kafka has acknowledged nothing for so many seconds.",
)
@json_option
def spool_replay(
    config: Path | None,
    brokers: str | None,
    state_dir: Path | None,
    quarantine: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Send what waits, while no producer runs. Exits with 69 if some still waits, with 65 if some is lost."""
    from producer import replay
    from producer.errors import IncompleteError

    settings = load(config).with_values(kafka__brokers=brokers, state_dir=state_dir)
    if settings.kafka.brokers is None:
        usage("spool replay needs --brokers")
    sent = replay.replay(settings, stop_on_signals(), timeout_s=timeout, quarantine=quarantine)
    if as_json:
        echo(to_json({topic: asdict(each) for topic, each in sent.items()}))
    else:
        echo(lines(f"{topic} {each}" for topic, each in sent.items()))
    waiting, lost = replay.complaint(sent)
    if waiting:
        raise UnavailableError(waiting)
    if lost:
        raise IncompleteError(lost)


@spool.command("drop")
@config_option
@state_dir_option
@quarantine_option
@click.option("--yes", is_flag=True, help="Really: it is gone for good.")
@json_option
def spool_drop(config: Path | None, state_dir: Path | None, quarantine: bool, yes: bool, as_json: bool) -> None:
    """Give up what waits, while no producer runs; the account has it as lost."""
    from producer import replay

    if not yes:
        usage("spool drop deletes events for good: say --yes")
    settings = load(config).with_values(state_dir=state_dir)
    dropped = replay.drop_quarantine(settings) if quarantine else replay.drop(settings)
    if as_json:
        echo(to_json({topic: {"dropped": count} for topic, count in dropped.items()}))
    else:
        echo(lines(f"{topic} dropped={count}" for topic, count in dropped.items()))
