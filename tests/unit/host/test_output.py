"""Foreign text reaches the log and the terminal as text within a line only; output that fails has its exit code."""

import ast
import io
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from producer.cli import main
from producer.commands.spool_show import Damage, Verified
from producer.commands.tail import Event, json_line
from producer.commands.verify import TopicReport, show
from producer.config import load
from producer.consume.audit import BootReport
from producer.errors import OutputError, ReaderGoneError, UnavailableError
from producer.health.status import table
from producer.host import systemd
from producer.host.output import MAX_RECORD_BYTES, JournalFormatter, JsonFormatter, LineFormatter, echo, require_reader
from producer.host.text import to_json
from producer.view.line import Lines
from tests.support.rebpf import command, rebpf
from tests.support.records import RETRANSMIT

PRODUCER = Path(load.__file__).parents[1]
HOSTILE = [
    "\x1b[2J\x1b]0;gone\x07",
    "x\r\n2026-01-01 00:00:00,000 ERROR forged",
    "x\nREADY=1\nMAINPID=1",
    "\x9b31m\x85next",
    "\u202egnirts",
    "a\u2028b\u2029c",
    "nul\0\x7f\b\t",
    "\ud800 \udcff",
    "long " * 20_000,
]
hostile = pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))


def record_of(message: str, *arguments: object, **more: Any) -> logging.LogRecord:
    return logging.LogRecord("producer", logging.ERROR, "", 0, message, arguments, more.get("exc_info"))


def raised(error: Exception) -> Any:
    try:
        raise error
    except Exception:
        return sys.exc_info()


@hostile
def test_a_record_is_one_printable_line(text: str) -> None:
    line = LineFormatter().format(record_of("name=%s", text))
    assert line.isprintable()
    assert " ERROR name=" in line
    assert len(line.encode()) <= MAX_RECORD_BYTES


def test_a_cut_record_says_so() -> None:
    for text in ("a" * 100_000, "ü" * 100_000):
        line = LineFormatter().format(record_of(text))
        assert line.endswith("...[cut]")
        assert MAX_RECORD_BYTES - 4 < len(line.encode()) <= MAX_RECORD_BYTES


@hostile
def test_the_lines_of_a_traceback_are_indented(text: str) -> None:
    error = ValueError(text)
    error.add_note(text)
    first, *rest = LineFormatter().format(record_of("%s", text, exc_info=raised(error))).split("\n")
    assert rest
    assert first.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert sum(len(line.encode()) + 1 for line in (first, *rest)) <= MAX_RECORD_BYTES + 1


def test_a_traceback_of_many_lines_keeps_its_end() -> None:
    lines = LineFormatter().format(record_of("m", exc_info=raised(ValueError("x\n" * 50_000 + "the end")))).split("\n")
    assert lines[1].endswith("...[cut]")
    assert lines[-1].endswith("the end")


def test_arguments_that_do_not_fit_cost_no_line() -> None:
    assert LineFormatter().format(record_of("count=%d", "\x1b")).endswith(r"count=%d ('\x1b',)")


@hostile
def test_each_line_for_the_journal_begins_with_its_priority_and_has_no_time(text: str) -> None:
    error = ValueError(text)
    error.add_note(text)
    first, *rest = JournalFormatter().format(record_of("%s", text, exc_info=raised(error))).split("\n")
    assert first.startswith("<3>ERROR ")
    assert rest
    assert all(line.startswith("<3>    ") for line in rest)
    assert all(line.isprintable() for line in (first, *rest))
    assert sum(len(line.encode()) + 1 for line in (first, *rest)) <= MAX_RECORD_BYTES + 1


@pytest.mark.parametrize(("level", "priority"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_the_priority_is_the_severity_of_rfc_5424(level: int, priority: int) -> None:
    record = logging.LogRecord("producer", level, "", 0, "text", (), None)
    assert JournalFormatter().format(record).startswith(f"<{priority}>")


@hostile
def test_json_has_one_bounded_object_per_line(text: str) -> None:
    line = JsonFormatter().format(record_of("name=%s", text, exc_info=raised(ValueError(text))))
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= MAX_RECORD_BYTES
    record = json.loads(line)
    assert list(record) == ["time", "level", "logger", "message", "traceback"]
    assert (record["level"], record["logger"]) == ("error", "producer")
    assert record["message"].startswith("name=")
    assert datetime.fromisoformat(record["time"]).utcoffset() == timedelta()


def journal(stderr: Any) -> dict[str, str]:
    status = os.fstat(stderr.fileno())
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ([], "<3>ERROR rebpf: "),
        (["--log-format", "text"], "rebpf: "),
        (["--log-format", "json"], '{"time": "'),
    ],
)
def test_an_error_has_the_format_of_the_log(options: list[str], start: str, tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w+b") as stderr:
        environment = os.environ | journal(stderr)
        missing = ["check", "--config", str(tmp_path / "missing.toml")]
        assert subprocess.run(command(*options, *missing), stderr=stderr, env=environment, check=False).returncode == 78
        stderr.seek(0)
        assert stderr.read().decode().startswith(start)


def test_without_the_journal_at_the_other_end_the_log_is_text(tmp_path: Path) -> None:
    environment = {**os.environ, "JOURNAL_STREAM": "1:1"}
    missing = ["check", "--config", str(tmp_path / "missing.toml")]
    ended = subprocess.run(command(*missing), stderr=subprocess.PIPE, env=environment, check=False)
    assert ended.stderr.startswith(b"rebpf: ")


def test_each_line_of_a_usage_error_has_its_priority(tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w+b") as stderr:
        environment = os.environ | journal(stderr)
        assert subprocess.run(command("run", "--unknown"), stderr=stderr, env=environment, check=False).returncode == 64
        stderr.seek(0)
        assert all(line.startswith("<3>ERROR ") for line in stderr.read().decode().splitlines())


@hostile
def test_echo_cleans_each_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    echo(text)
    out = capsys.readouterr().out
    assert len(out.split("\n")) == len(text.split("\n")) + 1
    assert all(line.isprintable() for line in out.split("\n"))


def test_colors_pass_where_they_are_asked_for_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    echo("\x1b[1;31mred\x1b[0m\x1b[2J", color=True)
    echo("\x1b[31mred")
    assert capsys.readouterr().out == "\x1b[1;31mred\x1b[0m\\x1b[2J\n\\x1b[31mred\n"


def test_echo_writes_what_the_encoding_lacks_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    echo("größe 日本")
    assert raw.getvalue() == b"gr\\xf6\\xdfe \\u65e5\\u672c\n"


def test_a_stream_that_is_closed_is_an_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OutputError, match="closed"):
            echo("text")


@hostile
def test_json_is_printable_ascii_and_parses_to_the_same_value(text: str) -> None:
    for line in (to_json({"name": text}), json_line(Event(text, text, {"name": text}))):
        assert line.isascii()
        assert line.isprintable()
        assert json.loads(line)["name"] == text


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.rebpf, "main", fail)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    on_hangup = signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
    finally:  # main sets up the log and the signals of this process
        signal.signal(signal.SIGHUP, on_hangup)
        root.handlers[:] = handlers
        root.setLevel(level)
    code = ended.value.code
    assert isinstance(code, int)
    return code


@hostile
def test_an_error_is_one_printable_line(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(monkeypatch, UnavailableError(text)) == 69
    err = capsys.readouterr().err
    assert err.startswith("rebpf: ")
    assert err.removesuffix("\n").isprintable()
    assert len(err) <= MAX_RECORD_BYTES + 1


@hostile
def test_a_usage_error_is_printable(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (click.UsageError(text), click.BadParameter(text), click.NoSuchOption(text)):
        with monkeypatch.context() as patch:
            assert failing(patch, error) == 64
        err = capsys.readouterr().err.removesuffix("\n")
        assert err.isprintable()
        assert err.startswith("Error: ")


@pytest.mark.parametrize(
    "arguments",
    [["\x1b[2J\nforged"], ["run", "--port", "\x1b\nforged"], ["run", "--\x1b\nforged"], ["run", "\x9b\nforged"]],
)
def test_the_command_line_is_quoted_safely(arguments: list[str]) -> None:
    done = rebpf(*arguments)
    assert done.returncode == 64
    assert all(line.isprintable() and not line.startswith("forged") for line in done.stderr.split("\n"))


@hostile
def test_a_line_of_the_view_is_printable(text: str) -> None:
    record = {**RETRANSMIT, "cause": text, "saddr": text}
    assert Lines(200, hosts=True, color=False).line(record).isprintable()


@hostile
def test_a_status_has_a_line_for_each_thing(text: str) -> None:
    loss = {"stage": text, "reason": text, "count": 1}
    counts = dict.fromkeys(("passed", "delivered", "in_flight", "spooled", "in_ring", "ring_used_bytes"), 0)
    stream = {"topic": text, "hook": text, **counts, "ring_bytes": 1, "spool_bytes": 0, "lost": [loss]}
    facts = {"host": text, "version": text, "pid": 1, "rules_version": 1, "cpu_s": 1.0, "rss_bytes": 1}
    shown = table({"state": text, "reasons": [text], **facts, "streams": [stream]})
    assert len(shown.split("\n")) == 14
    assert all(line.isprintable() for line in shown.split("\n"))


@hostile
def test_a_report_of_a_topic_has_a_line_for_each_boot(text: str) -> None:
    boot = BootReport(text, text, 0, 0, 1, 0, 0, 0, 0, 0, 0, {})
    reports = [TopicReport(text, 1, 1, 0, 0, 0, (boot,))] * 2
    shown = show(reports, as_json=False)
    assert len(shown.split("\n")) == 4
    assert all(line.isprintable() for line in shown.split("\n"))
    assert show(reports, as_json=True).isprintable()


@hostile
def test_a_report_of_a_spool_has_a_line_for_each_file(text: str) -> None:
    shown = str(Verified(1, 1, (Damage(text, 1, 1),) * 2))
    assert len(shown.split("\n")) == 3
    assert all(line.isprintable() for line in shown.split("\n"))


@hostile
def test_a_status_for_systemd_is_one_assignment(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert systemd.notify("READY=1", status=text)
        lines = manager.recv(1 << 20).decode().split("\n")
    assert [line.partition("=")[0] for line in lines] == ["READY", "STATUS"]
    assert all(line.isprintable() for line in lines)


def test_a_host_name_of_odd_bytes_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: os.fsdecode(b"web\xff\n1\x1b"))
    assert load.load(None).with_values().host == "web%FF%0A1%1B"


SHELL = [
    ("{} version > /dev/full", 74, "rebpf: standard output: No space left on device\n"),
    ("{} version >&-", 74, "rebpf: standard output is closed: redirect it to /dev/null if it is not needed\n"),
    ("{} run --help > /dev/full", 74, "rebpf: standard output: No space left on device\n"),
    ("{} version 2>&- > /dev/null", 0, ""),
    ("{} rn 2> /dev/full", 64, ""),
    ("{} tail --state-dir /nonexistent 2>&-", 64, ""),
]


@pytest.mark.parametrize(("line", "code", "said"), SHELL)
def test_output_that_cannot_be_written_has_its_exit_code(line: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", line.format(shlex.join(command()))], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("arguments", [["version"], ["--help"], ["run", "--help"]])
def test_a_reader_that_has_gone_causes_no_message(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command(*arguments), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = rebpf("spool", "show", "--state-dir", tmp_path / "größe", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"gr\xf6\xdfe: nothing is spooled" in done.stdout


STOPPED = """
from producer.agent import agent
from producer.health import balance
from producer.cli import main

agent.run = lambda *_: {"tcp_transmit": balance.Balance(passed=7, delivered=7)}
main.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", ["run", "run --json"])
@pytest.mark.parametrize("closed", [">/dev/full", ">&-"])
def test_a_balance_that_cannot_be_printed_is_logged(options: str, closed: str) -> None:
    line = f"{shlex.join([sys.executable, '-c', STOPPED])} {options}"
    done = subprocess.run(["/bin/sh", "-c", f"{line} {closed}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "WARNING the balance cannot be printed: standard output" in done.stderr
    assert "passed=7" in done.stderr
    both = subprocess.run(["/bin/sh", "-c", f"{line} {closed} 2>/dev/full"], timeout=60, check=False)
    assert both.returncode == 0


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    program = (
        "from producer.host.output import hold_descriptors; hold_descriptors(); print(open('/dev/zero').fileno() > 2)"
    )
    line = shlex.join([sys.executable, "-c", program])
    done = subprocess.run(["/bin/sh", "-c", f"{line} <&- 2>&-"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"


# The programs at both ends of the lab's traffic speak to their parent only.
ALLOWED = {("demo/traffic.py", "print"), ("view/terminal.py", "sys.stdout.write")}


def test_all_output_goes_through_one_module() -> None:
    found = {
        (path.relative_to(PRODUCER).as_posix(), called)
        for path in PRODUCER.rglob("*.py")
        if path.name != "output.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (called := ast.unparse(node.func))
        in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer.write")
    }
    assert found == ALLOWED


def test_a_reader_that_has_gone_is_noticed_without_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe, (tmp_path / "file").open("w") as file:
        for stream in (pipe, file, None):
            monkeypatch.setattr(sys, "stdout", stream)
            require_reader()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(ReaderGoneError):
            require_reader()
