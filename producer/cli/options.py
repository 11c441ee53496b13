"""Shared by the commands: help, options, environment variables, and loading the configuration."""

import importlib.util
import ipaddress
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from producer.errors import ConfigError, UnavailableError, UsageError
from producer.host.output import echo

_FILE = "producer.config"
"""Where the context has the path of the configuration that was read."""
_NOW_NS = time.time_ns()
"""The same for all options: from 2h to 1h ago is an hour."""
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


class Address(click.ParamType):  # type: ignore[type-arg] # not generic in click 8.1
    """An IP address."""

    name = "ADDRESS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the address."""
        try:
            return ipaddress.ip_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(click.FloatRange):
    """A number in a range; click takes nan for one in every range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a number, found {value!r}", param, ctx)
        return number


class Whole(click.IntRange):
    """An integer in a range."""

    name = "number"


class FilePath(click.Path):
    """The path of a file or folder. Python takes an empty one, of an unset variable, for the working directory."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not str(value).strip():
            self.fail(f"expected a path, found {value!r}", param, ctx)
        return super().convert(value, param, ctx)


class Offset(click.ParamType):  # type: ignore[type-arg] # not generic in click 8.1
    """An offset in a partition; None is the beginning."""

    name = "OFFSET"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the offset; a negative one counts from the end."""
        if value == "beginning":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected a number or 'beginning', found {value!r}", param, ctx)


class Time(click.ParamType):  # type: ignore[type-arg] # not generic in click 8.1
    """A time, or how long ago it was; in nanoseconds since 1970."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the time."""
        from producer.host.times import parse_time

        try:
            return parse_time(value, _NOW_NS)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class TopicName(click.ParamType):  # type: ignore[type-arg] # not generic in click 8.1
    """A valid topic name, checked here because librdkafka's error is less clear."""

    name = "TOPIC"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name."""
        if not _TOPIC.fullmatch(value) or value in (".", ".."):
            self.fail(f"expected 1 to 249 of the characters a-z A-Z 0-9 . _ -, found {value!r}", param, ctx)
        return value


_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+")
"""What Kubernetes and Docker set REBPF_PORT to if a service, or a linked container, has the name rebpf."""


class _Option(click.Option):
    """Rejects an environment variable that is set but empty or blank, which click treats as unset."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the value of the variable. Raises UsageError if it is empty."""
        if isinstance(self.envvar, str) and not os.environ.get(self.envvar, "set").strip():
            raise UsageError(f"{self.envvar} is set but empty: give it a value, or unset it")
        value = super().resolve_envvar_value(ctx)
        return None if self.name == "port" and _SERVICE_LINK.fullmatch(value or "") else value


_FILTERS = (
    ("host, unit, comm", "name; * and ? are wildcards"),
    ("peer, local, addr", "address or network of the peer, of this side, of either"),
    ("port, sport, dport", "port or range of either side, of this side, of the peer"),
    ("cause", "rto, fast, slow_start, tlp, syn, syn_ack or other"),
    ("srtt, rto, ratio, ...", "number, compared: srtt > 200ms, ratio > 1%"),
)
_JOINED = """Joined with and, or, not and parentheses; values can be lists: port 80,443. More are in rebpf(1) and
docs/views.md."""


class _HelpByEcho(click.Command):
    """A command whose help is written by `echo`."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return click's option, changed to write by `echo`."""
        help_option = super().get_help_option(ctx)
        if help_option is not None:
            help_option.callback = _show_help
        return help_option


class Command(_HelpByEcho):
    """A command whose help ends with examples: (command line, description)."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the kinds of filters, and the examples."""
        if {each.name for each in self.params} & {"filter_words", "filter_text"}:
            with formatter.section("Filters"):
                formatter.write_dl(_FILTERS)
                formatter.write_text(_JOINED)
        if self.examples:
            with formatter.section("Examples"):
                for line, meaning in self.examples:
                    formatter.write_text(f"# {meaning}")
                    formatter.write_text(line)


class Group(_HelpByEcho, click.Group):
    """A group of such commands; `sections` maps headings of its help to command names."""

    command_class = Command

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with its summary."""
        for heading, names in (self.sections or {"Commands": self.list_commands(ctx)}).items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=100)) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and add file and line to errors in settings."""
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, EOFError) as error:  # click would hide these bugs
            raise RuntimeError(f"unexpected {error!r}") from error
        except ConfigError:
            from producer.config.load import located

            with located(ctx.meta.get(_FILE)):
                raise


def _show_help(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        echo(ctx.get_help())
        ctx.exit()


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Return an option that can also be set in the environment: --state-dir as REBPF_STATE_DIR."""
    variable = "REBPF_" + names[0].removeprefix("--").split("/")[0].upper().replace("-", "_")
    return click.option(*names, envvar=variable, cls=_Option, **settings)


config_option = option("--config", type=FilePath(), help="Configuration (TOML), with conf.d/*.toml beside it.")
brokers_option = option("--brokers", help="Kafka bootstrap servers, HOST:PORT[,...].")
registry_option = option("--registry", help="URL of the schema registry (Confluent API).")
pods_url_option = option("--pods-url", help="URL of the list of this node's Kubernetes pods.")
state_dir_option = option(
    "--state-dir",
    type=FilePath(readable=False),  # our own error says what to do
    help="Folder for the spool, the ledger and the lock.",
)
address_option = option("--address", type=Address(), multiple=True, help="Capture this address only; repeatable.")
port_option = option("--port", type=Whole(1, 65535), multiple=True, help="Capture this port only; repeatable.")
pin_option = option("--pin", type=FilePath(), help="Keep hooks and rings in this bpffs folder across a crash.")
quarantine_option = option("--quarantine", is_flag=True, help="Use the messages that Kafka rejected, not the spool.")
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")


SETTINGS = {
    "brokers": "kafka__brokers",
    "registry": "registry__url",
    "address": "capture__addresses",
    "port": "capture__ports",
    "state_dir": "state_dir",
    "pin": "capture__pin",
    "pods_url": "kubernetes__pods_url",
}
"""The setting that each of the options above overrides."""


def settings_options(command: Any) -> Any:
    """Add all of SETTINGS to a command."""
    capture = pin_option(address_option(port_option(command)))
    return brokers_option(registry_option(state_dir_option(pods_url_option(capture))))


def load(path: Path | None, *, secrets: bool = True, **options: Any) -> Any:
    """Read the configuration. These options, of SETTINGS, override it, and so does --log-level."""
    from producer.config import load

    level = click.get_current_context().find_root().params.get("log_level")
    values = {SETTINGS[name]: value for name, value in options.items()}
    config = load.load(path, secrets=secrets)
    click.get_current_context().meta[_FILE] = path
    return config.with_values(log_level=level, **values)


def require_packages(command: str, *packages: str) -> None:
    """Raise UnavailableError with the fix if a package is missing."""
    if missing := [each for each in packages if importlib.util.find_spec(each) is None]:
        names = " and ".join(missing)
        raise UnavailableError(f"`rebpf {command}` needs {names}: pip install '.[report]' in a checkout of ReBPF")


def usage(message: str) -> NoReturn:
    """Raise a UsageError."""
    raise UsageError(message)
