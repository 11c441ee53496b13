"""The manual pages: rebpf(1) from the command line's own help and docs/views.md, rebpf.toml(5) from
docs/configuration.md.

Run with click and the checkout on Python's path: `manpages.py VERSION DATE FOLDER` writes both into FOLDER, and the
completions of the shells too.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from producer import errors
from producer.cli.main import rebpf
from producer.host.signals import QUIT_NOW

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_SHELLS = ("bash", "zsh", "fish")
_SETTINGS = ["key", "type", "default", "what it does", "option, environment"]

_FILES = """\
/etc/rebpf/rebpf.toml|The configuration of the service: rebpf.toml(5).
/var/lib/rebpf|Its ledger, and the events spooled on disk.
/usr/lib/rebpf|The program, and the Python packages that come with it."""
_ENVIRONMENT = (
    "Each option can be set in the environment: `--state-dir` as `REBPF_STATE_DIR`. Options override the environment."
)
_CHECK = """\
`rebpf check` exits with the highest code among its findings: at least 75 while a producer uses its state folder."""
_AT_ONCE = "Terminated at once by a second SIGINT or SIGTERM, or by a first SIGINT if no orderly stop is needed."


def command_page(version: str, date: str) -> str:
    """Return rebpf(1)."""
    lines = [_title("rebpf", 1, version, date), ".SH NAME", _text(f"rebpf - {_summary(rebpf)}")]
    lines += [".SH SYNOPSIS", *_synopsis(click.Context(rebpf, info_name="rebpf"))]
    lines += [".SH OPTIONS", *_options(click.Context(rebpf, info_name="rebpf")), ".SH COMMANDS"]
    for context in _commands(click.Context(rebpf, info_name="rebpf")):
        path = context.command_path.removeprefix("rebpf ")
        lines += [f".SS {_text(path)}", *_synopsis(context), ".PP", _text(_help(context.command)), *_options(context)]
    lines += [*_filters(), ".SH EXAMPLES", *_examples(), ".SH ENVIRONMENT", _text(_ENVIRONMENT)]
    lines += [".SH FILES", *(_entry(*line.split("|")) for line in _FILES.splitlines())]
    lines += [".SH EXIT STATUS", _entry("0", "Success."), *(_entry(*pair) for pair in _exit_codes())]
    lines += [".PP", _text(_CHECK), ".SH SEE ALSO", ".BR rebpf.toml (5)"]
    return "\n".join(lines) + "\n"


def configuration_page(version: str, date: str) -> str:
    """Return rebpf.toml(5)."""
    text = re.sub(r"<!--.*?-->\n", "", (_DOCS / "configuration.md").read_text(), flags=re.DOTALL)
    _, _, body = text.partition("\n")  # less its title
    lines = [_title("rebpf.toml", 5, version, date), ".SH NAME", _text("rebpf.toml - configuration of rebpf")]
    lines += [".SH DESCRIPTION", *_markdown(body), ".SH SEE ALSO", ".BR rebpf (1)"]
    return "\n".join(lines) + "\n"


def completion(shell: str) -> str:
    """Return the script that completes the command in a shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(rebpf, {}, "rebpf", "_REBPF_COMPLETE").source()


def _title(name: str, section: int, version: str, date: str) -> str:
    return f'.TH {name.upper()} {section} {date} "rebpf {version}"'


def _commands(context: click.Context) -> Iterator[click.Context]:
    """Yield a context of each command below a group, those of inner groups after the group's."""
    for name in context.command.list_commands(context):  # type: ignore[attr-defined] # of a group
        command = context.command.get_command(context, name)  # type: ignore[attr-defined]
        inner = click.Context(command, info_name=name, parent=context)
        yield inner
        if isinstance(command, click.Group):
            yield from _commands(inner)


def _synopsis(context: click.Context) -> list[str]:
    words = " ".join(context.command.collect_usage_pieces(context))
    return [f".B {_text(context.command_path)}", _text(words)]


def _options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record and "--help" not in parameter.opts:
            yield _entry(record[0], record[1])


def _examples() -> Iterator[str]:
    for context in _commands(click.Context(rebpf, info_name="rebpf")):
        for line, meaning in getattr(context.command, "examples", ()):
            yield _entry(line, f"{meaning}.")


def _filters() -> Iterator[str]:
    """Yield the section on filters of docs/views.md."""
    text = (_DOCS / "views.md").read_text().partition("\n## Filters\n")[2].partition("\n## ")[0]
    yield from (".SH FILTERS", *_markdown(text))


def _help(command: click.Command) -> str:
    return " ".join((command.help or "").split())


def _summary(command: click.Command) -> str:
    text = _help(command).partition(".")[0]
    return text[0].lower() + text[1:]


def _exit_codes() -> Iterator[tuple[str, str]]:
    meanings = {errors.RebpfError.exit_code: "Internal error: a bug.", QUIT_NOW: _AT_ONCE}
    tree: list[Any] = [errors.RebpfError]
    for kind in tree:
        meanings.setdefault(kind.exit_code, kind.__doc__)
        tree += kind.__subclasses__()
    yield from ((str(code), meaning) for code, meaning in sorted(meanings.items()))


def _markdown(text: str) -> Iterator[str]:
    """Yield the lines of a page for a Markdown text of headings, tables, lists, blocks of code and paragraphs."""
    for block in re.findall(r"```.*?```|[^\n](?:.(?!\n\n))*.?", text, flags=re.DOTALL):
        if block.startswith("```"):
            yield from _code(block.split("\n")[1:-1])
        elif block.startswith("    "):
            yield from _code(line.removeprefix("    ") for line in block.split("\n"))
        elif block.startswith("#"):
            yield f".SH {_text(block.lstrip('# '))}"
        elif block.startswith("|"):
            yield from _table(block.splitlines())
        elif block.startswith("- "):
            yield from _list(block)
        else:
            yield from (".PP", _text(" ".join(block.split())))


def _code(lines: Iterable[str]) -> Iterator[str]:
    yield from (".PP", ".RS 4", ".nf", ".ft CR", *map(_escape, lines), ".ft R", ".fi", ".RE")


def _list(block: str) -> Iterator[str]:
    for item in re.split(r"^- ", block, flags=re.MULTILINE)[1:]:
        yield f".IP \\(bu 2\n{_text(' '.join(item.split()))}"


def _table(rows: list[str]) -> Iterator[str]:
    head, _, *cells = ([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows)
    for key, *values in cells:
        if head == _SETTINGS:
            kind, default, what, option = values
            values = [what, f"Type: {kind}; default: {default}.", f"Also {option}." if option else ""]
        yield _entry(key, " ".join(filter(None, values)))


def _entry(tag: str, text: str) -> str:
    return f".TP\n\\fB{_text(tag)}\\fR\n{_text(text)}"


def _text(text: str) -> str:
    """Return a line of text, with Markdown's `code` and **strong** in bold."""
    return re.sub(r"`([^`]+)`|\*\*(.+?)\*\*", lambda found: f"\\fB{found[1] or found[2]}\\fR", _escape(text))


def _escape(line: str) -> str:
    line = line.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + line if line.startswith((".", "'")) else line


def _write(folder: Path, files: Iterable[tuple[str, str]]) -> None:
    for name, text in files:
        (folder / name).write_text(text)


if __name__ == "__main__":
    version, date, folder = sys.argv[1:]
    pages = [("rebpf.1", command_page(version, date)), ("rebpf.toml.5", configuration_page(version, date))]
    _write(Path(folder), [*pages, *((shell, completion(shell)) for shell in _SHELLS)])
