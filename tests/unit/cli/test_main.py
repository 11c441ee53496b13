"""The command line: exit codes, one clear line for each mistake, and where a setting comes from."""

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from producer.cli import main
from producer.cli.main import rebpf as group
from producer.host import capabilities
from tests.support.rebpf import as_nobody, rebpf

COMMANDS = sorted(group.commands)


def test_the_script_and_the_module_are_the_same_command():
    script = Path(sys.executable).with_name("rebpf")
    by_script = subprocess.run([script, "version"], capture_output=True, text=True, timeout=60)

    assert by_script.returncode == 0
    assert by_script.stdout.startswith("rebpf ")
    assert rebpf("version").stdout == by_script.stdout


INTERRUPTED = """
import os, signal, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "producer.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
"""


@pytest.mark.parametrize("start", ["-m producer", "rebpf"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    script = Path(sys.executable).with_name("rebpf")
    command = [sys.executable, "-m", "producer"] if start.startswith("-m") else [sys.executable, script]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})

    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("command", [[], *([each] for each in COMMANDS)])
def test_help_exits_with_0(command):
    done = rebpf(*command, "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_can_be_set_in_the_environment(command):
    given = [each for each in group.commands[command].params if each.name not in ("help", "limit")]
    options = [each for each in given if not isinstance(each, click.Argument)]  # files to read, words of a filter

    assert {each.envvar for each in options} == {
        "REBPF_" + each.opts[0].removeprefix("--").upper().replace("-", "_") for each in options
    }


def commands(group: click.Group) -> Iterator[Any]:
    for command in group.commands.values():
        yield from commands(command) if isinstance(command, click.Group) else [command]


def test_no_summary_is_truncated_at_80_columns():
    for arguments in ([], ["spool"]):
        for line in rebpf(*arguments, "--help", env={"COLUMNS": "80"}).stdout.splitlines():
            assert len(line) <= 80
            assert line.startswith("Usage:") or not line.endswith("...")


def test_each_summary_has_one_line_in_80_columns():
    sections = rebpf("--help", env={"COLUMNS": "80"}).stdout.partition("Capture:\n")[2]
    lines = [line for line in sections.splitlines() if line.startswith("  ")]
    assert not [line for line in lines if line.startswith("    ")], "the rest of a summary"


def test_each_command_stands_in_one_section():
    assert sorted(name for names in group.sections.values() for name in names) == COMMANDS


def parse(arguments: list[str]) -> click.Command:
    """Parse a command line and return its command, which does not run: it would change this process's logging."""
    context: Any = group.make_context("rebpf", arguments)
    while isinstance(context.command, click.Group):
        _, inner, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = inner.make_context(inner.name, rest, parent=context)
    return context.command


def test_each_command_has_an_example_that_parses():
    for command in commands(group):
        if command.name == "version":
            continue
        assert command.examples, command.name
        for line, _ in command.examples:
            program, *arguments = shlex.split(line.partition(" | ")[0])
            assert program == "rebpf"
            assert parse(arguments) is command


@pytest.mark.slow
def test_commands_with_a_filter_say_what_it_can_be():
    shown = {name: rebpf(name, "--help").stdout for name in ("top", "trace", "tail", "report", "export", "status")}
    assert [name for name, text in shown.items() if "\nFilters:\n" in text] == [
        "top",
        "trace",
        "tail",
        "report",
        "export",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "-r", "x", "--since", "noon"], "'--since': expected a time in UTC such as"),
        (["export", "-o", "x", "--until", "1"], "'--until': expected a time in UTC such as"),
        (["rn"], "No such command 'rn'"),
        (["run", "--brokrs", "a:1"], "No such option"),
        (["run", "more"], "unexpected extra argument"),
        (["run", "--port", "0"], "0 is not in the range"),
        (["run", "--port", "http"], "'http' is not a valid number"),
        (["run", "--address", "1.2.3"], "'1.2.3' does not appear to be an IPv4 or IPv6 address"),
        (["run", "--duration", "-1"], "-1.0 is not in the range"),
        (["tail", "-n", "0"], "0 is not in the range"),
        (["tail", "--topic", ""], "expected 1 to 249 of the characters"),
        (["tail", "--topic", os.fsdecode(b"caf\xe9\x1b[2J")], r"found 'caf\udce9\x1b[2J'"),
        (["verify", "--brokers", "127.0.0.1:1", "--topic", "a" * 250], "expected 1 to 249 of the characters"),
        (["run", "--state-dir", ""], "'--state-dir': expected a path, found ''"),
        (["spool", "drop", "--state-dir", ""], "'--state-dir': expected a path, found ''"),
        (["report", "", "-o", "x"], "'[FILE...]': expected a path, found ''"),
        (["tail", "--state-dir", "/nonexistent"], "no producer is running with state_dir /nonexistent"),
        (["init"], "init needs --brokers"),
        (["--log-level", "loud", "version"], "'loud' is not one of"),
    ],
)
def test_a_usage_error_is_64(arguments, message):
    done = rebpf(*arguments)

    assert (done.returncode, done.stdout) == (64, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [({"REBPF_PORT": "443 99999"}, "99999 is not in the range"), ({"REBPF_ADDRESS": "here"}, "'here' does not appear")],
)
def test_a_mistake_in_the_environment_is_a_usage_error(env, message):
    done = rebpf("run", env=env)

    assert done.returncode == 64
    assert message in done.stderr


def test_a_mistake_in_the_file_is_78(tmp_path):
    path = tmp_path / "rebpf.toml"
    path.write_text("[capture]\nprots = [443]")
    done = rebpf("run", env={"REBPF_CONFIG": str(path)})

    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"rebpf: {path}: ")
    assert done.stderr.endswith("unknown key capture.prots: did you mean ports?\n")


@pytest.mark.parametrize("command", ["alert", "init", "tail", "verify"])
def test_every_command_names_the_file_and_line_of_a_wrong_setting(tmp_path, command):
    path = tmp_path / "rebpf.toml"
    path.write_text('[kafka]\nbrokers = "127.0.0.1:1"\n[kafka.settings]\n"sasl.pasword" = "x"\n')
    done = rebpf(command, "--config", path)

    wrong = 'kafka.settings.sasl.pasword: No such configuration property: "sasl.pasword"'
    assert (done.returncode, done.stderr) == (78, f"rebpf: {path}: line 4: {wrong}\n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('acks = "1"', "kafka.settings.acks: must be all, since delivery depends on it: remove it"),
        (
            '"compression.codec" = "soon"',
            "kafka.settings.compression.codec: Invalid value",
        ),
    ],
)
def test_a_setting_that_delivery_or_librdkafka_refuses_is_78(tmp_path, settings, message):
    path = tmp_path / "rebpf.toml"
    path.write_text(f"[kafka.settings]\n{settings}")
    done = rebpf("run", "--config", path, "--state-dir", tmp_path / "state")

    assert done.returncode == 78
    assert done.stderr.startswith(f"rebpf: {path}: line 2: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.root
def test_an_impossible_state_folder_is_78(tmp_path):
    (tmp_path / "file").write_text("")
    done = rebpf("run", "--state-dir", tmp_path / "file")

    assert (done.returncode, done.stderr) == (78, f"rebpf: state_dir {tmp_path}/file: File exists\n")


def test_a_user_without_capabilities_gets_one_line_and_77():
    done = rebpf("run", before=as_nobody())

    assert done.returncode == 77
    assert done.stderr == "rebpf: loading BPF programs needs root, or the capabilities CAP_BPF and CAP_PERFMON\n"


@pytest.mark.slow
def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path):
    path = tmp_path / "rebpf.toml"
    path.write_text('state_dir = "/of/the/file"')
    env = {"REBPF_STATE_DIR": "/of/the/environment", "REBPF_CONFIG": str(path)}

    def said(*arguments: str, **settings: dict[str, str]) -> str:
        return rebpf("tail", *arguments, **settings).stderr.partition("state_dir ")[2].partition(":")[0]

    assert said("--config", str(path)) == "/of/the/file"
    assert said(env=env) == "/of/the/environment"
    assert said("--state-dir", "/of/the/command/line", env=env) == "/of/the/command/line"


def test_a_relative_option_in_a_folder_that_no_longer_exists_is_a_configuration_error(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = rebpf(
        "status", "--state-dir", "state", before=["sh", "-c", f'cd "{gone}" && rmdir "{gone}" && exec "$@"', "sh"]
    )

    assert done.returncode == 78
    assert done.stderr.startswith(
        "rebpf: --state-dir or REBPF_STATE_DIR: state_dir: state: the working directory no lon"
    )
    assert len(done.stderr.splitlines()) == 1


def test_the_programs_name_can_be_any_bytes():
    comm = Path("/proc/thread-self/comm")
    before = comm.read_bytes()
    comm.write_bytes(b"caf\xe9\x85\n")  # as after a start through a link of that name
    try:
        effective = capabilities.effective()
    finally:
        comm.write_bytes(before)
    assert effective == capabilities.effective()


def test_no_path_is_empty() -> None:
    paths = [each for command in commands(group) for each in command.params if isinstance(each.type, click.Path)]
    assert {"config", "state_dir", "pin", "paths", "output", "replay", "write"} <= {each.name for each in paths}
    for each, value in itertools.product(paths, ("", " ")):
        with pytest.raises(click.BadParameter, match=f"expected a path, found '{value}'"):
            each.type.convert(value, each, None)


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--duration"),
        ("alert", "--duration"),
        ("demo", "--duration"),
        ("demo", "--loss"),
        ("top", "--window"),
        ("spool", "replay", "--timeout"),
    ],
)
@pytest.mark.parametrize("number", ["nan", "-nan", "inf", "1e999"])
def test_a_number_is_finite(command: tuple[str, ...], number: str) -> None:
    with pytest.raises(click.UsageError, match=r"expected a number|not in the range"):
        parse([*command, number])


def test_a_start_whose_files_are_cut_off_leaves_nothing_that_a_later_start_fails_on(tmp_path: Path) -> None:
    """Python caches byte code even if a limit or a full disk cuts it off."""
    shutil.copytree(Path(main.__file__).parents[1], tmp_path / "producer", ignore=shutil.ignore_patterns("__pycache__"))
    version = [sys.executable, "-m", "producer", "version"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for before in (["prlimit", "--fsize=4096:"], []):
        done = subprocess.run([*before, *version], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_locale_without_utf_8_means_the_same_paths(tmp_path: Path) -> None:
    path, state_dir = tmp_path / "größer.toml", tmp_path / "größer"
    path.write_text(f'state_dir = "{state_dir}"')
    state_dir.mkdir()
    done = rebpf("status", "--config", path, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 69
    assert done.stderr == f"rebpf: no producer is running with state_dir {state_dir}, or it is not ready yet\n"


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir", "SSLKEYLOGFILE"])
def test_nothing_goes_to_files_that_are_named_for_other_programs(tmp_path: Path, variable: str) -> None:
    """prometheus_client and Python's ssl write there, or fail if the folder is missing."""
    imports = "import producer.cli.main, producer.health.metrics, ssl; ssl.create_default_context()"
    for folder in (tmp_path, tmp_path / "missing"):
        env = {**os.environ, variable: str(folder / "keys" if variable == "SSLKEYLOGFILE" else folder)}
        subprocess.run([sys.executable, "-c", imports], check=True, env=env)
    assert not list(tmp_path.iterdir())


def test_a_reload_that_is_asked_for_during_a_start_does_not_end_it():
    code = """
import os, signal, sys
from producer.cli import main
from producer.config import load
def slow(*_, **__):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGHUP)
    raise load.ConfigError("the file was read")
load.load = slow
sys.argv = ["rebpf", "run"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (78, "rebpf: the file was read\n")


LATE = """
import os, signal, sys
from producer.cli.main import main

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, signal.SIGHUP)

late = Late()  # the interpreter's last act deletes it
sys.argv = ["rebpf", "run", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("option", "code"), [("--config=/nowhere", 78), ("--port=x", 64), ("--help", 0)])
def test_a_reload_that_arrives_at_the_very_end_does_not_change_the_exit_code(option: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, option], capture_output=True, timeout=60)
    assert done.returncode == code
