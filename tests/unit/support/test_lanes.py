"""Lanes of tests: all output is shown, and no crash or hang of one goes unnoticed or holds up the run."""

import io
import os
import re
import signal
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from tests.support import lanes
from tests.support.documents import ROOT
from tests.support.lanes import NO_TESTS, PLANS, Failure, Lane, last_summary, run
from tests.support.procfs import ends

PYTHON = (sys.executable, "-c")


def lane(name: str, code: str, limit_s: float = 60, after: tuple[str, ...] = ()) -> Lane:
    return Lane(name, (code,), limit_s, after)


def test_output_is_whole_and_each_failure_is_named() -> None:
    out = io.StringIO()
    plan = [
        lane("good", "print('a' * 100_000)"),
        lane("bad", "print('b' * 100_000); raise SystemExit(1)"),
        lane("crash", "import os; os.kill(os.getpid(), 9)"),
        lane("none", f"raise SystemExit({NO_TESTS})"),
    ]
    failed = run(plan, PYTHON, [], out)
    assert sorted(failed, key=attrgetter("lane")) == [
        Failure("bad", "exit code 1", ()),
        Failure("crash", "exit code -9", ()),
        Failure("none", f"exit code {NO_TESTS}", ()),
    ]
    assert "a" * 100_000 in out.getvalue()
    assert "b" * 100_000 in out.getvalue()


def test_options_may_leave_nothing_of_a_lane() -> None:
    assert run([lane("none", f"raise SystemExit({NO_TESTS})")], PYTHON, ["-k", "x"], io.StringIO()) == []


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["trap '' INT", "trap 'kill $!; exit' INT"], ids=["ignores", "obeys"])
def test_a_lane_that_hangs_is_ended_with_its_children(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_CLEAN_UP_S", 0.5)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        hangs = lane("hangs", f"{trap}; exec 9>{pipe}; sleep 600 & wait", 0.5)
        assert run([hangs], ("sh", "-c"), [], io.StringIO()) == [Failure("hangs", "timed out", ())]
        os.set_blocking(reader.fileno(), True)
        assert reader.read() == b"", "the last process that held the pipe has ended"


def test_a_lane_begins_when_those_before_it_have_ended(tmp_path: Path) -> None:
    file = str(tmp_path / "done")
    plan = [
        lane("last", f"open({file!r}).close()", after=("first",)),
        lane("first", f"import time; time.sleep(0.3); open({file!r}, 'w').close()"),
    ]
    assert run(plan, PYTHON, [], io.StringIO()) == []


def test_an_interrupt_reaches_the_lanes(tmp_path: Path) -> None:
    pipe = str(tmp_path / "pid")
    inner = (
        "import os, time\n"
        f"os.write(os.open({pipe!r}, os.O_WRONLY), b'%d\\n' % os.getpid())\n"
        "while True: time.sleep(0.05)\n"
    )
    outer = (
        "import sys\n"
        "from tests.support.lanes import Lane, run\n"
        f"run([Lane('sleeps', ({inner!r},), 60)], [sys.executable, '-c'], [], sys.stdout)\n"
    )
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "==== sleeps: started\n"
        with open(pipe) as reader:
            pidfd = os.pidfd_open(int(reader.readline()))
        try:
            runner.send_signal(signal.SIGINT)
            assert ends(pidfd)
        finally:
            os.close(pidfd)
        output, _ = runner.communicate(timeout=30)
    assert "==== sleeps: interrupted" in output


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of two lanes of pytest in a folder where the test adds tests."""
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--tier')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # most of their start
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text("def test_good(): pass\n")
    plan = [Lane(name, (str(tmp_path / f"test_{name}.py"),), 60) for name in ("one", "two")]
    monkeypatch.setitem(lanes.PLANS, "default", plan)
    return tmp_path


def test_a_test_that_fails_beside_others_and_passes_alone_is_reported(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (plan / "test_two.py").write_text(
        "import pathlib\n"
        "def test_flaky():\n"
        "    file = pathlib.Path(__file__).with_name('ran')\n"
        "    ran = file.exists()\n"
        "    file.touch()\n"
        "    assert ran\n"
    )
    assert lanes.run_tier("default", []) == 0
    assert re.search(r"^FLAKY: .*test_flaky failed beside other tests and passed alone$", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_a_test_that_also_fails_alone_fails_the_run(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plan / "test_two.py").write_text("def test_bad(): assert False\n")
    assert lanes.run_tier("default", []) == 1
    out = capsys.readouterr().out
    assert "test_bad: also alone" in out
    assert "FLAKY" not in out


def test_many_failures_are_not_run_again(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plan / "test_two.py").write_text("".join(f"def test_{each}(): assert False\n" for each in range(6)))
    assert lanes.run_tier("default", []) == 1
    out = capsys.readouterr().out
    assert "6 failed" in out
    assert "again" not in out


@pytest.mark.parametrize("tier", ["quick", "default"])
def test_the_lanes_have_all_folders_of_their_tier(tier: str) -> None:
    parts = [each for plan in PLANS[tier] for each in plan.arguments]
    folders = {f"tests/{path.relative_to(ROOT / 'tests').parts[0]}" for path in ROOT.glob("tests/**/test_*.py")}
    if tier == "quick":
        count = len(PLANS[tier])
        of = [f"--part={part}/{count}" for part in range(1, count + 1)]
        assert sorted(parts) == sorted(["tests/unit", "tests/property"] * count + of)
    else:
        moved = [part.removeprefix("--ignore=") for part in parts if part.startswith("--ignore=")]
        assert sorted(part for part in parts if not part.startswith("--ignore=")) == sorted([*folders, *moved])
        assert all((ROOT / path).exists() for path in moved)


def test_tests_that_were_not_run_are_from_the_last_summary() -> None:
    text = (
        "= short test summary info =\nSKIPPED [1] of the guest\n"
        "NOT RUN in this tier: 3 tests of tests/vm (run scripts/test --all)\n"
        "\x1b[36m= short test summary info =\x1b[0m\n\x1b[33mSKIPPED\x1b[0m [2] x.py:1: NO KAFKA\n= 1 passed =\n"
    )
    assert last_summary(text) == [
        "NOT RUN in this tier: 3 tests of tests/vm (run scripts/test --all)",
        "NOT RUN on this machine: [2] x.py:1: NO KAFKA",
    ]
