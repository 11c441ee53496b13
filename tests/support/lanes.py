"""Runs a tier's tests in lanes, pytest processes side by side: `python -m tests.support.lanes TIER [OPTION...]`.

Most time of the integration tests is waiting, so that others fit beside them. The kernel tests come last, except those
of whole commands: the hooks see the traffic of the whole host. Beside them run only tests without sockets. Options are
passed to each lane. With a path or a test's id there is one lane. A lane's output is printed in whole when it ends.
Each lane has a time limit. `nice` says who waits if all want a CPU: those whose deadlines are a kernel's or a broker's
come first.

At the end, the few tests that failed beside other lanes are run again, alone. Those that pass then are listed as
FLAKY. What fails alone fails the run.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TESTS_FAILED = 1
"""pytest's exit code if tests failed."""
NO_TESTS = 5
"""pytest's exit code if it has selected no tests."""
_CLEAN_UP_S = 60
_FLAKY = 5
"""If more tests fail, none is run again: the cause is not the load."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Lane:
    """pytest's arguments, the lanes that have to end first, and how far it gives way to the others."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    after: tuple[str, ...] = ()
    nice: int = 0


COMMANDS = (
    "tests/kernel/test_check_and_run.py",
    "tests/kernel/test_demo.py",
    "tests/kernel/test_pictures.py",
    "tests/kernel/test_report.py",
    "tests/kernel/test_views.py",
    "tests/kernel/test_without_compiler.py",
)
"""Tests of whole commands, which look at namespaces of their own only."""
BUSY = (
    "tests/integration/test_budget.py",
    "tests/integration/test_crash.py",
    "tests/integration/test_without_brokers.py",
    "tests/integration/test_faults.py",
    "tests/integration/test_figures.py",
    "tests/integration/test_latency.py",
    "tests/integration/test_lifecycle.py",
    "tests/integration/test_memory.py",
    "tests/integration/test_run.py",
    "tests/integration/test_spool.py",
    "tests/integration/test_web_config.py",
)
"""Integration tests that make much traffic, capture that of the whole host, or compare with the kernel's counters.

None of them runs beside another one.
"""


def _without(files: Sequence[str]) -> list[str]:
    """Return pytest's options that leave files out."""
    return [f"--ignore={file}" for file in files]


_PARTS = 6
_FIRST = ("integration", "packaging", "commands")
"""The last lanes that make traffic, except that of the kernel tests."""
PLANS: Mapping[str, Sequence[Lane]] = {
    # More than there are CPUs: some tests wait for a deadline.
    "quick": [
        Lane(f"part {part}", ("tests/unit", "tests/property", f"--part={part}/{_PARTS}"), 600)
        for part in range(1, _PARTS + 1)
    ],
    "default": [
        # Three at a time: two with Kafka, which mostly wait, and one that needs a CPU.
        Lane("busy", BUSY, 3000),
        Lane("integration", ("tests/integration", *_without(BUSY)), 3000, nice=5),
        Lane("vm", ("tests/vm",), 3000, nice=5),
        Lane("unit", ("tests/unit", "tests/fuzz"), 3000, after=("vm",), nice=5),
        Lane("packaging", ("tests/packaging",), 3000, after=("unit",), nice=5),
        Lane("commands", COMMANDS, 3000, after=("busy",), nice=5),
        Lane("kernel", ("tests/kernel", "tests/chaos", *_without(COMMANDS)), 1800, after=_FIRST),
        Lane("property", ("tests/property",), 1800, after=_FIRST, nice=10),
    ],
    "all": [Lane("all", (), 6 * 3600)],
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A lane that failed, why, and pytest's ids of the tests that failed, if it got to its end."""

    lane: str
    reason: str
    tests: tuple[str, ...]


@dataclass(slots=True)
class Running:
    """A started lane; its `end` is when it has to have ended."""

    lane: Lane
    process: "subprocess.Popen[bytes]"
    output: Path
    began: float
    end: float
    told: bool = False
    """Whether it was interrupted because its time was over."""

    def enforce(self) -> None:
        """Interrupt the lane when its time is over, so that it reports and cleans up; kill it a minute later."""
        if time.monotonic() < self.end:
            return
        if self.told:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.send_signal(signal.SIGINT)
        self.told = True
        self.end = time.monotonic() + _CLEAN_UP_S

    def failure(self) -> Failure:
        """Describe how it failed."""
        reason = "timed out" if self.told else f"exit code {self.process.returncode}"
        cache = self.output.parent / "cache/v/cache/lastfailed"
        ran = not self.told and self.process.returncode == _TESTS_FAILED and cache.exists()
        return Failure(self.lane.name, reason, tuple(json.loads(cache.read_text())) if ran else ())


def run(lanes: Sequence[Lane], command: Sequence[str], options: Sequence[str], out: IO[str]) -> list[Failure]:
    """Run `command`, a lane's arguments and `options` for each lane; return those that failed."""
    failed: list[Failure] = []
    skipped: list[str] = []
    left = list(lanes)
    with tempfile.TemporaryDirectory(prefix="rebpf-", ignore_cleanup_errors=True) as name, _ended() as running:
        folder = Path(name)
        folder.chmod(0o711)
        while left or running:
            names = {each.name for each in left} | {each.lane.name for each in running}
            for lane in [each for each in left if not names & set(each.after)]:
                left.remove(lane)
                running.append(_start(lane, [*command, *lane.arguments, *options], folder / f"{len(left)}"))
                print(f"==== {lane.name}: started", file=out, flush=True)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                text = each.output.read_text(errors="replace")
                took = f"{time.monotonic() - each.began:.0f} s"
                print(f"==== {each.lane.name}\n{text}==== {each.lane.name}: {took}", file=out, flush=True)
                skipped += last_summary(text)
                if each.told or each.process.returncode not in ((0, NO_TESTS) if options else (0,)):
                    failed.append(each.failure())
            for each in running:
                each.enforce()
            time.sleep(_POLL_S)
    for line in skipped:
        print(line, file=out)
    return failed


def _start(lane: Lane, command: Sequence[str], folder: Path) -> Running:
    # Its own root for tmp_path: each pytest takes the common one's rights away, while tests of another need them.
    folder.mkdir(mode=0o711)
    output = folder / "output"
    with output.open("wb") as file:
        # It ends with us, and has a session of its own, so that a terminal's interrupt reaches it once, by us.
        process = subprocess.Popen(
            ["nice", "-n", str(lane.nice), "setpriv", "--pdeathsig", "INT", *command],
            env={
                **os.environ,
                "PYTEST_DEBUG_TEMPROOT": str(folder),
                "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} -o cache_dir={folder / 'cache'}",
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    began = time.monotonic()
    return Running(lane, process, output, began, began + lane.limit_s)


@contextlib.contextmanager
def _ended() -> Iterator[list[Running]]:
    """Collect running lanes; on an interrupt, interrupt them and print what they have written."""
    running: list[Running] = []
    try:
        yield running
    finally:
        for each in running:
            each.process.send_signal(signal.SIGINT)
        for each in running:
            try:
                each.process.wait(_CLEAN_UP_S)
            except subprocess.TimeoutExpired:
                os.killpg(each.process.pid, signal.SIGKILL)
            print(f"==== {each.lane.name}: interrupted\n{each.output.read_text(errors='replace')}", flush=True)


def last_summary(text: str) -> list[str]:
    """Return the lines of what was not run, from pytest's last summary.

    The last one, since the output of a failure may include that of a virtual machine.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    tiers = re.findall(r"^(?:NOT RUN in this tier|FLAKY): .*$", plain, re.MULTILINE)
    summary = plain.rpartition(" short test summary info ")[2]
    return tiers + [f"NOT RUN on this machine: {line}" for line in re.findall(r"^SKIPPED (.*)$", summary, re.MULTILINE)]


def is_path(argument: str) -> bool:
    return not argument.startswith("-") and Path(argument.partition("::")[0]).exists()


def run_tier(tier: str, options: Sequence[str]) -> int:
    """Run the tier, or what the options select, and return the exit code."""
    color = "yes" if sys.stdout.isatty() else "no"
    command = [sys.executable, "-m", "pytest", "-ra", f"--tier={tier}", f"--color={color}"]
    lanes = [Lane("selected", (), 6 * 3600)] if any(map(is_path, options)) else PLANS[tier]
    failed = run(lanes, command, options, sys.stdout)
    for each in failed:
        print(f"==== FAILED: {each.lane}: {each.reason}")
    tests = [test for each in failed for test in each.tests]
    if len(lanes) > 1 and all(each.tests for each in failed) and 0 < len(tests) <= _FLAKY:
        failed = run([Lane("again, alone", tuple(tests), 3000)], command, options, sys.stdout)
        still = {test for each in failed for test in each.tests or tests}
        for test in tests:
            if test in still:
                print(f"==== FAILED: {test}: also alone")
            else:
                print(f"FLAKY: {test} failed beside other tests and passed alone")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(run_tier(sys.argv[1], sys.argv[2:]))
