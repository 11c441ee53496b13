"""The command `rebpf`: reads the command line, builds what it asks for, and turns errors into exit codes."""

import contextlib
import io
import logging
import os
import signal
import sys
from dataclasses import replace
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any, NoReturn

import click

from producer import stdio
from producer.cli_alert import alert
from producer.cli_spool import spool
from producer.errors import OutputError, ReaderGoneError, RebpfError, UnavailableError, UsageError
from producer.options import (
    Address,
    Group,
    Offset,
    TopicName,
    brokers_option,
    config_option,
    json_option,
    load,
    option,
    registry_option,
    state_dir_option,
    usage,
)
from producer.output import LineFormatter, bounded, echo, flushed, hold_descriptors
from producer.signals import QUIT_NOW, set_on, stop_on_signals
from producer.text import lines, printable, to_json

# One thread is enough for what numpy does here, and its library would start one for each CPU on import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

logger = logging.getLogger(__name__)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@option(
    "--log-level",
    default="info",
    type=click.Choice(["debug", "info", "warning", "error"]),
    show_default=True,
    help="Least important lines to log.",
)
def rebpf(log_level: str) -> None:
    """Stream this host's TCP segments and retransmits from the kernel to Kafka."""
    _log_from(max(logging.WARNING, logging.getLevelName(log_level.upper())))
    # Not the libraries' loggers: the registry client's logs each request.
    logging.getLogger("producer").setLevel(log_level.upper())


def _log_from(level: int) -> None:
    handler = stdio.LogHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


rebpf.add_command(spool)
rebpf.add_command(alert)


@rebpf.command()
@config_option
@brokers_option
@registry_option
@option("--duration", type=click.FloatRange(min=0), help="Stop after so many seconds.")
@option("--address", type=Address(), multiple=True, help="Only segments from or to this address; repeatable.")
@option("--port", type=click.IntRange(1, 65535), multiple=True, help="Only segments from or to this port; repeatable.")
@state_dir_option
@option("--pin", type=click.Path(path_type=Path), help="Folder in a bpffs that keeps rings and hooks over a crash.")
@json_option
def run(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    duration: float | None,
    address: tuple[Any, ...],
    port: tuple[int, ...],
    state_dir: Path | None,
    pin: Path | None,
    as_json: bool,
) -> None:
    """Capture and publish until SIGINT or SIGTERM. Without brokers, on an embedded one, for trying."""
    from producer.agent import Agent

    def read() -> Any:
        return load(config).with_values(
            kafka__brokers=brokers,
            registry__url=registry,
            capture__addresses=address,
            capture__ports=port,
            capture__pin=pin,
            state_dir=state_dir,
        )

    agent = Agent(read(), read)
    stop = stop_on_signals()
    balances = agent.run(stop, set_on(signal.SIGHUP), duration)
    stop.set()  # also after `duration`: output waits for no reader
    text = printable("balance " + " | ".join(f"{topic} {balance}" for topic, balance in balances.items()))
    try:
        echo(to_json({topic: balance.as_dict() for topic, balance in balances.items()}) if as_json else text)
    except OutputError as error:  # the stop was a good one nevertheless
        logger.warning("the balance cannot be printed: %s; %s", error, text)


@rebpf.command()
@config_option
@state_dir_option
def reload(config: Path | None, state_dir: Path | None) -> None:
    """Put the rules of the changed configuration in force, in the producer that runs here."""
    from producer import state
    from producer.config import placed
    from producer.ruleset import resolve
    from producer.rungs import cgroup2_root

    settings = load(config).with_values(state_dir=state_dir)
    if config is not None:
        with placed(config):
            resolve(settings, cgroup2_root()).tables()
    version = state.reload(settings.state_dir)
    echo(f"rules version {version} is in force")


@rebpf.command()
@config_option
@brokers_option
@registry_option
@option("--topic", type=TopicName(), multiple=True, help="Only this topic; repeatable.")
@click.option("-n", "limit", type=click.IntRange(min=1), help="Stop after so many events.")
@option("--from-beginning", is_flag=True, help="Begin with the oldest event, not with the next.")
@state_dir_option
@json_option
def tail(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    topic: tuple[str, ...],
    limit: int | None,
    from_beginning: bool,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Show events from the topics, as any consumer reads them. Without brokers: of the producer that runs here."""
    from producer import state
    from producer.events import STREAMS
    from producer.provision import topic as topic_of
    from producer.tail import tail as tail_topics

    settings = load(config).with_values(kafka__brokers=brokers, registry__url=registry, state_dir=state_dir)
    facts: dict[str, Any] = {"brokers": settings.kafka.brokers, "registry": settings.registry.url}
    if settings.kafka.brokers is None:
        facts = state.running(settings.state_dir) or usage(
            f"no producer runs with state_dir {settings.state_dir}: give --brokers, or start `rebpf run`"
        )
    tail_topics(
        facts["brokers"],
        topic or tuple(topic_of(settings, stream) for stream in STREAMS),
        registry=replace(settings.registry, url=facts["registry"]),
        as_json=as_json,
        limit=limit,
        color=sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ,
        from_beginning=from_beginning,
        stop=stop_on_signals(),
        client_settings=settings.kafka.settings,
    )


@rebpf.command()
@config_option
@state_dir_option
@json_option
def status(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Say how the producer that runs here fares, and where its events are."""
    from producer import state
    from producer.endpoint import ask
    from producer.status import table

    folder = load(config).with_values(state_dir=state_dir).state_dir
    facts = state.running(folder)
    if facts is None:
        raise UnavailableError(f"no producer runs with state_dir {folder}, or it is not ready")
    if not facts.get("status_url"):
        raise UnavailableError(f"the producer with pid {facts['pid']} has no endpoint: set metrics.listen")
    report = ask(facts["status_url"])
    echo(to_json(report) if as_json else table(report))


@rebpf.command()
@config_option
@brokers_option
@registry_option
@option("--topic", type=TopicName(), multiple=True, help="Only this topic; repeatable.")
@option("--host", help="Only the events of this host.")
@option(
    "--since-offset",
    type=Offset(),
    default="beginning",
    show_default=True,
    help="Begin here in each partition; a negative number: so many messages before the end.",
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
    """Read the topics to their end, and say what is missing, double or out of order. Exits with 65 if anything is."""
    from producer import verify as verifying
    from producer.errors import IncompleteError
    from producer.events import STREAMS
    from producer.provision import topic as topic_of

    settings = load(config).with_values(kafka__brokers=brokers, registry__url=registry)
    if settings.kafka.brokers is None:
        usage("verify needs --brokers")
    reports = verifying.verify(
        settings.kafka.brokers,
        tuple(dict.fromkeys(topic)) or tuple(topic_of(settings, stream) for stream in STREAMS),
        registry=settings.registry,
        host=host,
        since=since_offset,
        client_settings=settings.kafka.settings,
    )
    echo(verifying.show(reports, as_json=as_json))
    if complaint := verifying.complaint(reports):
        raise IncompleteError(complaint)


@rebpf.command()
@option("--duration", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Seconds of traffic.")
@option("--loss", type=click.FloatRange(0, 0.5), default=0.01, show_default=True, help="Share of packets lost.")
@json_option
def demo(duration: float, loss: float, as_json: bool) -> None:
    """Show it all: a producer, lossy traffic between two namespaces, the live view, and the kernel's own counts."""
    from producer.demo import demo as run_demo

    sys.exit(run_demo(duration_s=duration, loss=loss, as_json=as_json))


@rebpf.command()
@config_option
@brokers_option
@registry_option
@option(
    "--partitions", type=click.IntRange(min=1), default=6, show_default=True, help="Partitions of each topic of events."
)
@option("--replication", type=click.IntRange(min=1), default=1, show_default=True, help="Replicas of each partition.")
@option("--alerts", is_flag=True, help="Also the topics and the schema of `rebpf alert`.")
def init(
    config: Path | None, brokers: str | None, registry: str | None, partitions: int, replication: int, alerts: bool
) -> None:
    """Create the topics and register the schemas: an administrator's act, done once."""
    from producer.provision import create_topics, register_schemas

    settings = load(config).with_values(kafka__brokers=brokers, registry__url=registry)
    if settings.kafka.brokers is None:
        usage("init needs --brokers")
    done = create_topics(settings, partitions, replication, alerts=alerts)
    done += register_schemas(settings, alerts=alerts)
    echo(lines(done))


@rebpf.command()
@config_option
@brokers_option
@registry_option
@state_dir_option
@option("--explain", metavar="LOCAL,REMOTE", help="Say which rule decides over this connection.")
@option("--local", is_flag=True, help="Only this host: ask no server.")
@json_option
def check(
    config: Path | None,
    brokers: str | None,
    registry: str | None,
    state_dir: Path | None,
    explain: str | None,
    local: bool,
    as_json: bool,
) -> None:
    """Say what is missing here for a producer to run, and what mends it. Exits with 0 if nothing is."""
    from producer.errors import ConfigError
    from producer.explain import explain as explain_rules
    from producer.finding import Finding
    from producer.preflight import examine
    from producer.ruleset import resolve
    from producer.rungs import cgroup2_root

    try:
        settings = load(config).with_values(kafka__brokers=brokers, registry__url=registry, state_dir=state_dir)
    except ConfigError as error:
        if not as_json:
            raise
        echo(to_json([Finding("configuration", str(error), error.exit_code).as_dict()]))
        sys.exit(error.exit_code)
    if explain is not None:
        ruleset = resolve(settings, cgroup2_root())
        explanation = explain_rules(ruleset.rules, ruleset.default, explain)
        echo(to_json(explanation) if as_json else lines(explanation))
        return
    findings = examine(settings, path=config, servers=not local)
    if as_json:
        echo(to_json([finding.as_dict() for finding in findings]))
    else:
        echo(lines(map(str, findings)))
    sys.exit(max((finding.exit_code for finding in findings), default=0))


@rebpf.command()
def version() -> None:
    """Print the version."""
    echo(f"rebpf {distribution_version('rebpf')}")


def main() -> NoReturn:
    """Run the command line and exit."""
    hold_descriptors()
    stdio.take_over()
    _log_from(logging.WARNING)
    with flushed():
        sys.exit(_main())


def _main() -> int:
    """Run the command line; return the exit code."""
    try:
        rebpf.main(prog_name="rebpf", standalone_mode=False)
    except click.ClickException as error:
        _complain(_usage_text(error))
        return UsageError.exit_code
    except click.Abort:
        return QUIT_NOW
    except ReaderGoneError as error:
        return error.exit_code
    except RebpfError as error:
        _complain(bounded(printable(f"rebpf: {error}")))
        return error.exit_code
    except Exception:  # a defect
        logger.exception("rebpf: internal error")
        return RebpfError.exit_code
    return 0


def _usage_text(error: click.ClickException) -> str:
    """Return click's lines on a mistake; what the user gave begins no line of its own."""
    if not isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # whose message is the whole help
        message = bounded(printable(error.format_message()))
        error = click.UsageError(message, getattr(error, "ctx", None))
    buffer = io.StringIO()
    error.show(file=buffer)
    return buffer.getvalue().removesuffix("\n")


def _complain(text: str) -> None:
    """Write to standard error, if it can be written: the exit code says it too."""
    with contextlib.suppress(OutputError):
        echo(text, err=True)
