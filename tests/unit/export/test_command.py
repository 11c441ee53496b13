"""The commands as they are run: without the extra, into a full disk's file, and ended by a signal."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.analysis import write_scene
from tests.support.rebpf import rebpf

WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("pyarrow", "matplotlib") else find(name, *rest)
sys.argv = ["rebpf", *sys.argv[1:]]
from producer.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("command", "arguments", "missing"),
    [
        ("export", ("x.avro", "-o", "x"), "pyarrow"),
        ("report", ("x.avro", "-o", "x"), "pyarrow and matplotlib"),
        ("trace -r", ("x.parquet",), "pyarrow"),
    ],
)
def test_without_the_extra_it_says_what_to_install(command: str, arguments: Sequence[str], missing: str) -> None:
    run = [sys.executable, "-c", WITHOUT, *command.split(), *arguments]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == f"rebpf: `rebpf {command}` needs {missing}: pip install '.[report]' in a checkout of ReBPF\n"


@pytest.mark.slow
def test_files_are_exported_and_reported(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in")
    done = rebpf("export", scene, "-o", tmp_path / "out", "--topic", "tcp_flow", "--format", "csv")
    path = tmp_path / "out/tcp_flow/date=2026-09-21/begin-end.csv"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path} events=65\n", "")
    done = rebpf("report", scene, "-o", "/dev/full/report.html")
    assert (done.returncode, done.stderr) == (69, "rebpf: cannot write to /dev/full/report.html: Not a directory\n")


@pytest.mark.slow
def test_files_are_read_whatever_brokers_a_shell_has_set(tmp_path: Path) -> None:
    scene, shell = write_scene(tmp_path / "in"), {"REBPF_BROKERS": "kafka-1:9092"}
    assert rebpf("export", scene, "-o", tmp_path / "out", env=shell).returncode == 0
    done = rebpf("export", scene, "-o", tmp_path / "out", "--brokers", "kafka-1:9092", env=shell)
    assert (done.returncode, done.stderr) == (64, "rebpf: give either files or --brokers\n")


def test_whatever_the_umask_others_cannot_write_to_what_a_command_creates(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in")
    done = rebpf("export", scene, "-o", tmp_path / "out/deep", before=["sh", "-c", 'umask 0 && exec "$@"', "sh"])
    created = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert (done.returncode, len(created) > 5) == (0, True)
    assert [path for path in created if path.stat().st_mode & stat.S_IWOTH] == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["odd", "module://odd", "tkagg"])
def test_a_report_needs_no_backend_of_matplotlib(tmp_path: Path, backend: str) -> None:
    scene = write_scene(tmp_path / "in")
    done = rebpf("report", scene, "-o", tmp_path / "report.html", env={**os.environ, "MPLBACKEND": backend})
    assert (done.returncode, done.stderr) == (0, "")


def waiting_export(folder: Path, *before: str) -> "subprocess.Popen[str]":
    """Start an export to `folder`/out, which waits while it has files open."""
    scene, out = write_scene(folder / "in"), folder / "out"
    os.mkfifo(scene / "z.avro")
    run = [*before, sys.executable, "-m", "producer", "export", str(scene), "-o", str(out)]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.rglob("*.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_without_a_traceback_or_partial_files(tmp_path: Path, number: signal.Signals) -> None:
    process = waiting_export(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_under_nohup_it_goes_on_when_the_terminal_closes(tmp_path: Path) -> None:
    with waiting_export(tmp_path, "nohup") as process:
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert ignored & 1 << signal.SIGHUP - 1


def test_the_import_without_the_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['pyarrow'] = None; import rebpf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    fix = "pip install '.[report]' in a checkout of ReBPF"
    assert done.stderr.endswith(f"ModuleNotFoundError: rebpf.read needs pyarrow: {fix}\n")
