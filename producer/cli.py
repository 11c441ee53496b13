"""The command `rebpf`: reads the command line, builds what it asks for, and turns errors into exit codes."""

import ipaddress
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version as distribution_version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from producer.errors import RebpfError, UnavailableError, UsageError

# One thread is enough for what numpy does here, and its library would start one for each CPU on import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

logger = logging.getLogger(__name__)

_QUIT_NOW = 130


class _Address(click.ParamType[Any]):
    name = "ADDRESS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return ipaddress.ip_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Offset(click.ParamType[int | None]):
    name = "OFFSET"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "beginning":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'beginning'", param, ctx)


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option with its twin in the environment: --state-dir and REBPF_STATE_DIR."""
    twin = "REBPF_" + names[0].removeprefix("--").split("/")[0].upper().replace("-", "_")
    return click.option(*names, envvar=twin, show_envvar=True, **settings)


_config = _option("--config", type=click.Path(path_type=Path), help="TOML file with all settings.")
_brokers = _option("--brokers", help="Kafka brokers, HOST:PORT[,...].")
_registry = _option("--registry", help="URL of a Confluent-compatible schema registry.")
_state_dir = _option(
    "--state-dir", type=click.Path(path_type=Path), help="Folder for the lock and the running producer's facts."
)
_quarantine = _option("--quarantine", is_flag=True, help="Not what waits, but the messages that Kafka has refused.")
_json = _option("--json", "as_json", is_flag=True, help="Standard output carries JSON lines only.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@_option(
    "--log-level",
    default="info",
    type=click.Choice(["debug", "info", "warning", "error"]),
    show_default=True,
    help="Least important lines to log.",
)
def rebpf(log_level: str) -> None:
    """Stream this host's TCP segments and retransmits from the kernel to Kafka."""
    logging.basicConfig(
        level=max(logging.WARNING, logging.getLevelName(log_level.upper())),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
        force=True,
    )
    # Not the libraries' loggers: the registry client's logs each request.
    logging.getLogger("producer").setLevel(log_level.upper())


@rebpf.command()
@_config
@_brokers
@_registry
@_option("--duration", type=click.FloatRange(min=0), help="Stop after so many seconds.")
@_option("--address", type=_Address(), multiple=True, help="Only segments from or to this address; repeatable.")
@_option("--port", type=click.IntRange(1, 65535), multiple=True, help="Only segments from or to this port; repeatable.")
@_state_dir
@_option("--pin", type=click.Path(path_type=Path), help="Folder in a bpffs that keeps rings and hooks over a crash.")
@_json
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
        return _load(config).with_values(
            kafka__brokers=brokers,
            registry__url=registry,
            capture__addresses=address,
            capture__ports=port,
            capture__pin=pin,
            state_dir=state_dir,
        )

    agent = Agent(read(), read)
    balances = agent.run(_stop_on_signals(), _set_on(signal.SIGHUP), duration)
    if as_json:
        click.echo(json.dumps({topic: balance.as_dict() for topic, balance in balances.items()}))
    else:
        click.echo("balance " + " | ".join(f"{topic} {balance}" for topic, balance in balances.items()))


@rebpf.command()
@_config
@_state_dir
def reload(config: Path | None, state_dir: Path | None) -> None:
    """Put the rules of the changed configuration in force, in the producer that runs here."""
    from producer import state
    from producer.ruleset import resolve
    from producer.rungs import cgroup2_root

    settings = _load(config).with_values(state_dir=state_dir)
    if config is not None:
        resolve(settings, cgroup2_root()).tables()
    version = state.reload(settings.state_dir)
    click.echo(f"rules version {version} is in force")


@rebpf.command()
@_config
@_brokers
@_registry
@_option("--topic", multiple=True, help="Only this topic; repeatable.")
@click.option("-n", "limit", type=click.IntRange(min=1), help="Stop after so many events.")
@_option("--from-beginning", is_flag=True, help="Begin with the oldest event, not with the next.")
@_state_dir
@_json
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

    settings = _load(config).with_values(kafka__brokers=brokers, registry__url=registry, state_dir=state_dir)
    facts: dict[str, Any] = {"brokers": settings.kafka.brokers, "registry": settings.registry.url}
    if settings.kafka.brokers is None:
        facts = state.running(settings.state_dir) or _usage(
            f"no producer runs with state_dir {settings.state_dir}: give --brokers, or start `rebpf run`"
        )
    tail_topics(
        facts["brokers"],
        topic or tuple(topic_of(settings, stream) for stream in STREAMS),
        registry=replace(settings.registry, url=facts["registry"]),
        as_json=as_json,
        limit=limit,
        color=sys.stdout.isatty() and "NO_COLOR" not in os.environ,
        from_beginning=from_beginning,
        stop=_stop_on_signals(),
        client_settings=settings.kafka.settings,
    )


@rebpf.command()
@_config
@_state_dir
@_json
def status(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Say how the producer that runs here fares, and where its events are."""
    from producer import state
    from producer.endpoint import ask
    from producer.status import table

    folder = _load(config).with_values(state_dir=state_dir).state_dir
    facts = state.running(folder)
    if facts is None:
        raise UnavailableError(f"no producer runs with state_dir {folder}, or it is not ready")
    if not facts.get("status_url"):
        raise UnavailableError(f"the producer with pid {facts['pid']} has no endpoint: set metrics.listen")
    report = ask(facts["status_url"])
    click.echo(json.dumps(report) if as_json else table(report))


@rebpf.command()
@_config
@_brokers
@_registry
@_option("--topic", multiple=True, help="Only this topic; repeatable.")
@_option("--host", help="Only the events of this host.")
@_option(
    "--since-offset",
    type=_Offset(),
    default="beginning",
    show_default=True,
    help="Begin here in each partition; a negative number: so many messages before the end.",
)
@_json
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

    settings = _load(config).with_values(kafka__brokers=brokers, registry__url=registry)
    if settings.kafka.brokers is None:
        _usage("verify needs --brokers")
    reports = verifying.verify(
        settings.kafka.brokers,
        tuple(dict.fromkeys(topic)) or tuple(topic_of(settings, stream) for stream in STREAMS),
        registry=settings.registry,
        host=host,
        since=since_offset,
        client_settings=settings.kafka.settings,
    )
    click.echo(verifying.show(reports, as_json=as_json))
    if complaint := verifying.complaint(reports):
        raise IncompleteError(complaint)


@rebpf.group()
def spool() -> None:
    """What waits on disk for Kafka: look at it, send it without a capture, or give it up."""


@spool.command("show")
@_config
@_state_dir
@_json
def spool_show(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Say what waits, and what Kafka has refused. A producer may be at work meanwhile."""
    from producer import spoolreport

    settings = _load(config).with_values(state_dir=state_dir)
    found = spoolreport.look(settings)
    if as_json:
        click.echo(json.dumps({topic: asdict(each) for topic, each in (found or {}).items()}))
    elif found is None:
        click.echo(f"there is no state folder {settings.state_dir}: nothing waits")
    else:
        click.echo("\n".join(f"{topic} {each}" for topic, each in found.items()))


@spool.command("verify")
@_config
@_state_dir
@_json
def spool_verify(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Read all that waits, and say what is damaged. Exits with 65 if anything is."""
    from producer import spoolreport
    from producer.errors import IncompleteError

    found = spoolreport.verify(_load(config).with_values(state_dir=state_dir))
    if as_json:
        click.echo(json.dumps({name: each.as_dict() for name, each in found.items()}))
    else:
        click.echo("\n".join(f"{name} {each}" for name, each in found.items()))
    if complaint := spoolreport.complaint(found):
        raise IncompleteError(complaint)


@spool.command("replay")
@_config
@_brokers
@_state_dir
@_quarantine
@_option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Give up when Kafka has acknowledged nothing for so many seconds.",
)
@_json
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

    settings = _load(config).with_values(kafka__brokers=brokers, state_dir=state_dir)
    if settings.kafka.brokers is None:
        _usage("spool replay needs --brokers")
    sent = replay.replay(settings, _stop_on_signals(), timeout_s=timeout, quarantine=quarantine)
    if as_json:
        click.echo(json.dumps({topic: asdict(each) for topic, each in sent.items()}))
    else:
        click.echo("\n".join(f"{topic} {each}" for topic, each in sent.items()))
    waiting, lost = replay.complaint(sent)
    if waiting:
        raise UnavailableError(waiting)
    if lost:
        raise IncompleteError(lost)


@spool.command("drop")
@_config
@_state_dir
@_quarantine
@click.option("--yes", is_flag=True, help="Really: it is gone for good.")
@_json
def spool_drop(config: Path | None, state_dir: Path | None, quarantine: bool, yes: bool, as_json: bool) -> None:
    """Give up what waits, while no producer runs; the account has it as lost."""
    from producer import replay

    if not yes:
        _usage("spool drop deletes events for good: say --yes")
    settings = _load(config).with_values(state_dir=state_dir)
    dropped = replay.drop_quarantine(settings) if quarantine else replay.drop(settings)
    if as_json:
        click.echo(json.dumps({topic: {"dropped": count} for topic, count in dropped.items()}))
    else:
        click.echo("\n".join(f"{topic} dropped={count}" for topic, count in dropped.items()))


@rebpf.command()
@_option("--duration", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Seconds of traffic.")
@_option("--loss", type=click.FloatRange(0, 0.5), default=0.01, show_default=True, help="Share of packets lost.")
@_json
def demo(duration: float, loss: float, as_json: bool) -> None:
    """Show it all: a producer, lossy traffic between two namespaces, the live view, and the kernel's own counts."""
    from producer.demo import demo as run_demo

    sys.exit(run_demo(duration_s=duration, loss=loss, as_json=as_json))


@rebpf.command()
@_config
@_brokers
@_registry
@_option(
    "--partitions", type=click.IntRange(min=1), default=6, show_default=True, help="Partitions of each topic of events."
)
@_option("--replication", type=click.IntRange(min=1), default=1, show_default=True, help="Replicas of each partition.")
def init(config: Path | None, brokers: str | None, registry: str | None, partitions: int, replication: int) -> None:
    """Create the topics and register the schemas: an administrator's act, done once."""
    from producer.provision import create_topics, register_schemas

    settings = _load(config).with_values(kafka__brokers=brokers, registry__url=registry)
    if settings.kafka.brokers is None:
        _usage("init needs --brokers")
    for line in create_topics(settings, partitions, replication) + register_schemas(settings):
        click.echo(line)


@rebpf.command()
@_config
@_brokers
@_registry
@_state_dir
@_option("--explain", metavar="LOCAL,REMOTE", help="Say which rule decides over this connection.")
@_option("--local", is_flag=True, help="Only this host: ask no server.")
@_json
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
        settings = _load(config).with_values(kafka__brokers=brokers, registry__url=registry, state_dir=state_dir)
    except ConfigError as error:
        if not as_json:
            raise
        click.echo(json.dumps([Finding("configuration", str(error), error.exit_code).as_dict()]))
        sys.exit(error.exit_code)
    if explain is not None:
        ruleset = resolve(settings, cgroup2_root())
        lines = explain_rules(ruleset.rules, ruleset.default, explain)
        click.echo(json.dumps(lines) if as_json else "\n".join(lines))
        return
    findings = examine(settings, servers=not local)
    if as_json:
        click.echo(json.dumps([finding.as_dict() for finding in findings]))
    else:
        for finding in findings:
            click.echo(str(finding))
    sys.exit(max((finding.exit_code for finding in findings), default=0))


@rebpf.command()
def version() -> None:
    """Print the version."""
    click.echo(f"rebpf {distribution_version('rebpf')}")


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        rebpf.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except click.Abort:
        sys.exit(_QUIT_NOW)
    except RebpfError as error:
        click.echo(f"rebpf: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception:  # a defect
        logger.exception("rebpf: internal error")
        sys.exit(RebpfError.exit_code)
    sys.exit(0)


def _load(path: Path | None) -> Any:
    from producer import config

    return config.load(path)


def _usage(message: str) -> NoReturn:
    raise UsageError(message)


def _set_on(number: signal.Signals) -> threading.Event:
    """Return an event that a signal sets."""
    event = threading.Event()
    signal.signal(number, lambda *_: event.set())
    return event


def _stop_on_signals() -> threading.Event:
    """Return an event that SIGINT or SIGTERM sets; a second signal ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(_QUIT_NOW)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop
