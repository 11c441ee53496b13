"""Runs the kernel tests with hooks that may need another kernel than this machine's: fentry and kprobe.

REBPF_TEST_KERNELS has the Debian releases whose kernels are booted, by default `bookworm` (6.1):
REBPF_TEST_KERNELS=bookworm,trixie.
"""

import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.rebpf import COMPILED
from tests.support.vm import guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2100)]

KERNELS = os.environ.get("REBPF_TEST_KERNELS", "bookworm").split(",")
# If the hook makes no difference, this machine's kernel suffices, or one hook: in the guest, loading takes five seconds
# and compiling twenty.
# On Debian's kernels (perf_event_paranoid 3) only root can open a kprobe's perf event, even with CAP_PERFMON.
LEFT_OUT = {
    "fentry": ("test_lab.py", "test_demo.py", "test_compiled.py", "test_check_and_run.py", "test_without_compiler.py"),
    "kprobe": (
        "test_check_and_run.py",
        "test_lab.py",
        "test_demo.py",
        "test_compiled.py",
        "test_lifecycle.py",
        "test_rules.py",
        "test_overflow.py",
        "test_kept.py",
        "test_numbers.py",
        "test_unprivileged.py",
        "test_without_compiler.py",
    ),
}
LAST = ("test_lifecycle.py", "test_unprivileged.py")
# These depend most on the hook. The default tier runs only these, in a third of the time.
ESSENTIAL = (
    "test_overflow.py",
    "test_owner.py",
    "test_retransmit.py",
    "test_transmit.py",
    "test_truth.py",
)
# The only valid reason to skip a test. It also proves that cgroup_skb did not replace the hook under test.
SKIPPED = "only the cgroup_skb hook sees segments without a socket"
DEADLINE_S = 1800
AGAIN = "-again"
"""The run of the tests that failed, again. A guest without KVM is slow, and stalls when the host is busy."""


def command(results: Path, *, everything: bool) -> str:
    """Run both hooks in parallel, one per CPU. Nothing is compiled twice.

    With `everything`, the hook with fewer files runs some of the other one's at the end.
    """
    files = sorted(file.name for file in (guest.ROOT / "tests/kernel").glob("test_*.py"))
    chosen = {
        hook: [file for file in files if file not in left_out and (everything or file in ESSENTIAL)]
        for hook, left_out in LEFT_OUT.items()
    }
    fentry = _pytest(results, "fentry", *(file for file in chosen["fentry"] if file not in LAST))
    kprobe = _pytest(results, "kprobe", *chosen["kprobe"])
    last = f"; {_pytest(results, 'fentry-last', *LAST)}" if everything else ""
    return f"export {COMPILED}=/run/compiled\n{fentry} &\n{{ {kprobe}{last}; }} &\nwait"


def _pytest(results: Path, name: str, *files: str) -> str:
    hook, _, _ = name.partition("-")
    arguments = " ".join(f"tests/kernel/{file}" for file in files)
    tests = f"{sys.executable} -m pytest {arguments} -o cache_dir={results}/{name}.cache --timeout=600 --durations=5"
    runs = [
        f"{tests} {options} --junitxml={results}/{run}.xml >{results}/{run}.log 2>&1"
        for run, options in ((name, ""), (f"{name}{AGAIN}", "--last-failed --maxfail=1"))
    ]
    return f"{{ export REBPF_TEST_HOOKS={hook}; {' || '.join(runs)}; }}"


@pytest.fixture(scope="module", params=KERNELS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with pytest's reports from the guest, one per hook."""
    if reason := guest.refusal():
        pytest.skip(f"NO VIRTUAL MACHINE: {reason}")
    folder = tmp_path_factory.mktemp(request.param)
    tests = command(folder, everything=request.config.getoption("tier") == "all")
    assert guest.run(request.param, tests, DEADLINE_S, folder).status == 0, "the guest timed out"
    return folder


def outcomes(reports: Sequence[Path]) -> dict[str, str]:
    """Read pytest's reports: "passed", "failed" or the reason to skip, by test."""
    found = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "passed" if skipped is None else skipped.get("message", "")
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


@pytest.mark.parametrize("hook", LEFT_OUT)
def test_kernel_tests_pass(results: Path, hook: str, request: pytest.FixtureRequest) -> None:
    last = hook == "fentry" and request.config.getoption("tier") == "all"
    names = (hook, "fentry-last") if last else (hook,)
    print(*((results / f"{name}.log").read_text() for name in names), sep="\n")
    found = outcomes([results / f"{name}.xml" for name in names])
    again = outcomes([each for name in names if (each := results / f"{name}{AGAIN}.xml").exists()])
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    for test in (test for test, outcome in again.items() if outcome == "passed"):
        reporter.write_line(f"FLAKY: {test} with {hook} failed and then passed")
    found |= again
    assert {test: outcome for test, outcome in found.items() if outcome not in ("passed", SKIPPED)} == {}
    assert set(found.values()) == {"passed", SKIPPED}
