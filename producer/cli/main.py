"""The command `rebpf`: parses the command line, runs a command, and maps errors to exit codes."""

import contextlib
import io
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from producer import __version__
from producer.cli.alert import alert
from producer.cli.analysis import export, report
from producer.cli.compile import compile as compile_command
from producer.cli.config import config as config_command
from producer.cli.options import (
    Group,
    Number,
    config_option,
    json_option,
    load,
    option,
    settings_options,
    state_dir_option,
    usage,
)
from producer.cli.spool import spool
from producer.cli.topics import init, tail, verify
from producer.cli.view import top, trace
from producer.errors import OutputError, ReaderGoneError, RebpfError, UnavailableError, UsageError
from producer.host import signals, stdio
from producer.host.exhausted import exhausted, hidden
from producer.host.output import LineFormatter, bounded, echo, flushed, formatter, hold_descriptors, set_log_level
from producer.host.signals import QUIT_NOW, Hangup, stop_on_signals
from producer.host.text import lines, printable, to_json

# One thread is enough; otherwise numpy's OpenBLAS starts one per CPU on import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Of other programs: metrics, or the keys of TLS connections, would go to files there, or nothing would start.
for _name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir", "SSLKEYLOGFILE"):
    os.environ.pop(_name, None)

logger = logging.getLogger(__name__)


_SECTIONS = {
    "Capture": ("run", "reload", "status", "spool"),
    "View": ("top", "trace"),
    "Topics": ("init", "tail", "verify", "alert"),
    "Analysis": ("report", "export"),
    "Host": ("check", "config", "compile", "demo", "version"),
}


@click.group(
    cls=Group,
    sections=_SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each option can be set in the environment: --state-dir as REBPF_STATE_DIR.",
)
@option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Lowest level to log, instead of the configuration's log_level.  [default: info]",
)
@option(
    "--log-format",
    default="auto",
    type=click.Choice(["auto", "text", "journald", "json"]),
    show_default=True,
    help="Format of log lines; auto is journald under systemd, otherwise text.",
)
def rebpf(log_level: str | None, log_format: str) -> None:
    """Stream TCP connections, retransmissions and segments from the Linux kernel to Kafka."""
    level = log_level or "info"
    # Libraries log warnings at least: the registry client logs each request as info.
    _log_from(max(logging.WARNING, logging.getLevelName(level.upper())), formatter(log_format))
    set_log_level(level)


def _log_from(level: int, form: logging.Formatter) -> None:
    handler = stdio.LogHandler()
    handler.setFormatter(form)
    logging.basicConfig(level=level, handlers=[handler], force=True)


for each in (spool, alert, export, report, init, tail, verify, top, trace, config_command, compile_command):
    rebpf.add_command(each)


@rebpf.command(
    examples=(
        ("rebpf run --port 443", "Try it without Kafka, on connections from or to port 443"),
        ("rebpf run --brokers kafka-1:9092 --registry http://registry:8081", "Publish to Kafka"),
    )
)
@config_option
@settings_options
@option("--duration", type=Number(min=0), help="Stop after this many seconds.")
@json_option
def run(config: Path | None, duration: float | None, as_json: bool, **options: Any) -> None:
    """Capture events and publish them until SIGINT or SIGTERM.

    Without --brokers, uses an in-process test broker that stores nothing. SIGHUP reloads the configuration, but
    stops a run whose terminal has closed. At the end, prints the balance: how many events were captured, delivered,
    spooled and lost.
    """
    hangup = Hangup()  # first: a SIGHUP would end the process while this imports and reads
    from producer.agent.agent import run as run_agent
    from producer.agent.reload import ConfigReader
    from producer.config import sources
    from producer.config.load import located
    from producer.host import memory

    memory.configure()
    context = click.get_current_context()

    def read() -> Any:
        with context.scope(cleanup=False):  # for a thread that reads the configuration again
            return load(config, **options)

    reader = ConfigReader(read, lambda: sources.state(config), lambda: located(config))
    settings = reader.read()
    stop = stop_on_signals(hangup)
    balances = run_agent(settings, reader, stop, hangup, duration)
    stop.set()  # also after `duration`, so that output does not wait for a reader
    text = printable("balance " + " | ".join(f"{topic} {balance}" for topic, balance in balances.items()))
    try:
        echo(to_json({topic: balance.as_dict() for topic, balance in balances.items()}) if as_json else text)
    except OutputError as error:  # the stop itself succeeded
        logger.warning("the balance cannot be printed: %s; %s", error, text)


@rebpf.command(examples=(("rebpf reload --config /etc/rebpf/rebpf.toml", "Check the file, then apply it"),))
@config_option
@state_dir_option
def reload(config: Path | None, state_dir: Path | None) -> None:
    """Apply a changed configuration to the running producer.

    Prints the changed settings that need a restart. If the configuration is invalid, the one in force stays, and the
    producer's reason is printed.
    """
    from producer.host import state
    from producer.host.cgroups import cgroup2_root
    from producer.rules.resolve import resolve

    settings = load(config, secrets=False, state_dir=state_dir)
    if config is not None:
        resolve(settings, cgroup2_root()).tables()
    done = state.reload(settings.state_dir)
    echo(f"rules version {done.rules_version} is in force")
    if done.restart_needed:
        echo(f"these changed settings need a restart: {', '.join(done.restart_needed)}")


@rebpf.command(examples=(("rebpf status --json | jq .reasons", "Print why the producer is degraded"),))
@config_option
@state_dir_option
@json_option
def status(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Show the running producer's health and event counts."""
    from producer.commands.status import report
    from producer.health.status import table

    found = report(load(config, secrets=False, state_dir=state_dir))
    echo(to_json(found) if as_json else table(found))


@rebpf.command(examples=(("rebpf demo --loss 0.05", "Lose 5 % of the packets"),))
@option("--duration", type=Number(min=1), default=20.0, show_default=True, help="Seconds of traffic.")
@option("--loss", type=Number(0, 0.5), default=0.01, show_default=True, help="Fraction of packets to drop.")
@option("--events", is_flag=True, help="Also print retransmissions and a sample of the transmits as they arrive.")
@json_option
def demo(duration: float, loss: float, events: bool, as_json: bool) -> None:
    """Capture test traffic over a lossy link, and check the counts.

    Starts a producer and sends traffic between two network namespaces over a link that drops packets. Prints who lost
    segments, where and why, and compares the events with the kernel's counters.
    """
    from producer.demo.demo import demo as run_demo

    sys.exit(run_demo(duration_s=duration, loss=loss, as_json=as_json, show_events=events))


@rebpf.command(
    examples=(
        ("rebpf check --config /etc/rebpf/rebpf.toml", "Check the host, the configuration and the servers"),
        ("rebpf check --config rebpf.toml --offline", "Check a file on any machine, for CI and Ansible"),
        ("rebpf check --explain 10.0.0.7:443,10.2.0.9:51234", "Show which rule applies to a connection"),
    )
)
@config_option
@settings_options
@option("--explain", metavar="LOCAL,REMOTE", help="Show which rule applies to this connection, then exit.")
@option("--local", is_flag=True, help="Check this host only; contact no server.")
@option("--offline", is_flag=True, help="Check the configuration only, not this host; exits with 0 or 78.")
@json_option
def check(config: Path | None, explain: str | None, local: bool, offline: bool, as_json: bool, **options: Any) -> None:
    """Check that this host can run the producer.

    Takes the options of `rebpf run`. Suggests a fix for each problem. Exits with 0 if the producer would start.
    """
    from producer.commands.check import examine
    from producer.commands.check_settings import settings_offline
    from producer.commands.finding import Finding
    from producer.errors import ConfigError
    from producer.host.cgroups import cgroup2_root
    from producer.rules.explain import explain as explain_rules
    from producer.rules.resolve import resolve

    if offline and config is None:
        usage("--offline needs --config")
    try:
        connects = not offline and explain is None
        settings = load(config, secrets=connects, **options)
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
    findings = settings_offline(settings, config) if offline else examine(settings, path=config, servers=not local)
    if as_json:
        echo(to_json([finding.as_dict() for finding in findings]))
    else:
        echo(lines(map(str, findings)))
    sys.exit(max((finding.exit_code for finding in findings), default=0))


@rebpf.command()
def version() -> None:
    """Print the version."""
    echo(f"rebpf {__version__}")


def main() -> NoReturn:
    """Run the command line and exit."""
    if sys.getfilesystemencoding() != "utf-8":  # the locale is not UTF-8, but paths in the configuration are
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    signals.reset()
    os.umask(os.umask(0) & 0o075 | 0o002)  # an inherited one may deny us our own files, or let all write to them
    hold_descriptors()
    stdio.take_over()
    _log_from(logging.WARNING, formatter("auto"))
    with flushed():
        try:
            sys.exit(_main())
        finally:  # the interpreter restores the default when it exits, and a late reload would end it by this signal
            signal.signal(signal.SIGHUP, signal.SIG_IGN)


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
        _complain("\n".join(bounded(printable(line)) for line in (f"rebpf: {error}", *error.details)))
        return error.exit_code
    except Exception as error:
        if reason := exhausted(error) or hidden(error):
            logger.debug("%s", reason, exc_info=True)
            _complain(f"rebpf: {printable(reason)}")
            return UnavailableError.exit_code
        logger.exception("rebpf: internal error")
        return RebpfError.exit_code
    return 0


def _usage_text(error: click.ClickException) -> str:
    """Return click's message for a usage error, with the user's input escaped."""
    if not isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # whose message is the help
        message = bounded(printable(error.format_message()))
        error = click.UsageError(message, getattr(error, "ctx", None))
    buffer = io.StringIO()
    error.show(file=buffer)
    return buffer.getvalue().removesuffix("\n")


def _complain(text: str) -> None:
    """Write an error to standard error: as it is for people, as log records for the journal and for JSON."""
    handlers = logging.getLogger().handlers
    if all(type(handler.formatter) is LineFormatter for handler in handlers):
        with contextlib.suppress(OutputError):  # the exit code reports the error, too
            echo(text, err=True)
        return
    for line in filter(None, text.splitlines()):
        logger.error("%s", line)
