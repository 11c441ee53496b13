"""Runs the kernel tests with hooks that may need another kernel than this machine's: fentry and kprobe.

REBPF_TEST_KERNELS has the Debian releases whose kernels are booted, by default `bookworm` (6.1). `scripts/test --all`
adds trixie (6.12). Others: bullseye (5.10) and trixie-backports (the newest).
"""

import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.lanes import COMMANDS
from tests.support.rebpf import COMPILED
from tests.support.vm import guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

KERNELS = os.environ.get("REBPF_TEST_KERNELS", "bookworm").split(",")
PACKAGED = ("bookworm", "trixie")
"""Releases with a package of ReBPF. In the tier all, every file runs on their kernels."""
_ANY_HOOK = (
    *(Path(file).name for file in COMMANDS),
    "test_compiled.py",
    "test_lab.py",
    "test_limits.py",
    "test_view_counts.py",
)
"""If the hook makes no difference, this machine's kernel suffices: a guest compiles and fills connections slowly."""
# On Debian's kernels (perf_event_paranoid 3) only root can open a kprobe's perf event, even with CAP_PERFMON.
LEFT_OUT = {
    "fentry": (*_ANY_HOOK, "test_kprobe_misses.py"),
    "kprobe": (
        *_ANY_HOOK,
        "test_features.py",
        "test_kept.py",
        "test_lifecycle.py",
        "test_manifest.py",
        "test_numbers.py",
        "test_overflow.py",
        "test_rules.py",
        "test_unprivileged.py",
    ),
}
EACH_HOOK = "test_check_and_run.py::test_check_says_of_each_hook_what_run_finds"
"""Tries all hooks, whichever is under test."""
LAST = ("test_lifecycle.py", "test_unprivileged.py")
# These depend most on the hook. The default tier runs only these, in a third of the time; all others on other kernels.
ESSENTIAL = (
    "test_overflow.py",
    "test_owner.py",
    "test_retransmit.py",
    "test_transmit.py",
    "test_truth.py",
)
LONG = (
    "test_overflow.py",
    "test_owner.py::test_segments_of_sockets_older_than_the_programs_have_their_process",
    "test_retransmit.py::test_segments_add_up_to_the_kernels_counters[3]",
    "test_transmit.py::test_1009_connections_are_captured_segment_for_segment",
    "test_truth.py::test_1009_short_connections",
    "test_truth.py::test_bulk_with_random_loss[0.1%-single]",
    "test_truth.py::test_bulk_with_random_loss[1%-tso]",
    "test_truth.py::test_bulk_with_random_loss[1%-cut-ipv6]",
)
"""Left out in the default tier, where they would take 40 % of the time: the others prove the same of each hook."""
SKIPPED = "only the cgroup_skb hook sees segments without a socket"
"""The reason to skip a test with each hook under test: it proves that cgroup_skb did not replace the hook."""
NO_QUEUE = "this kernel has no netfilter queue"
"""Debian's has one in modules that only iptables loads. A queue concerns only cgroup_skb."""
NO_SHRINKING = "this kernel never shrinks a window (before Linux 6.6)"
NOT_COUNTED = "kernels before 6.7 do not count what a kprobe misses"
BY_CHANCE = ("the kernel skipped a run", "the machine stood still, so that a round trip is not known")
"""The other valid reasons. A guest without KVM is slow."""
DEADLINE_S = {"default": 1800, "all": 3000}
"""By tier."""
# Without these, which the kernel tests do not use, pytest starts in 1.0 s of CPU instead of 2.6, and here in much more.
WITHOUT = "--confcutdir=tests/kernel -p no:hypothesispytest -p no:anyio"
AGAIN = "-again"
"""The run of the tests that failed, again. A guest without KVM is slow, and stalls when the host is busy."""


def command(results: Path, suite: str, tier: str) -> str:
    """Run both hooks in parallel, one per CPU. Nothing is compiled twice.

    In the tier all, the hook with fewer files runs some of the other one's at the end.
    """
    everything = tier == "all" and suite in PACKAGED
    files = sorted(file.name for file in (guest.ROOT / "tests/kernel").glob("test_*.py"))
    chosen = {
        hook: [file for file in files if file not in others and (everything or file in ESSENTIAL)]
        for hook, others in LEFT_OUT.items()
    }
    left_out = LONG if tier == "default" else ()
    fentry = _pytest(results, "fentry", *(file for file in chosen["fentry"] if file not in LAST), left_out=left_out)
    kprobe = _pytest(results, "kprobe", *chosen["kprobe"], left_out=left_out)
    last = f"; {_pytest(results, 'fentry-last', *(LAST if everything else ()), EACH_HOOK)}" if tier == "all" else ""
    return f"modprobe tun; export {COMPILED}=/run/compiled\n{fentry} &\n{{ {kprobe}{last}; }} &\nwait"


def _pytest(results: Path, name: str, *files: str, left_out: Sequence[str] = ()) -> str:
    hook, _, _ = name.partition("-")
    arguments = " ".join(f"tests/kernel/{file}" for file in files)
    options = f"{WITHOUT} -o cache_dir={results}/{name}.cache --durations=5"
    options += "".join(f" '--deselect=tests/kernel/{test}'" for test in left_out)
    tests = f"{sys.executable} -m pytest {arguments} {options}"
    runs = [
        f"{tests} {which} --junitxml={results}/{run}.xml >{results}/{run}.log 2>&1"
        for run, which in ((name, ""), (f"{name}{AGAIN}", "--last-failed --maxfail=1"))
    ]
    return f"{{ export REBPF_TEST_HOOKS={hook}; {' || '.join(runs)}; }}"


@pytest.fixture(scope="module", params=KERNELS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with pytest's reports from the guest, one per hook."""
    if reason := guest.refusal():
        pytest.skip(f"NO VIRTUAL MACHINE: {reason}")
    folder = tmp_path_factory.mktemp(request.param)
    tier = request.config.getoption("tier")
    done = guest.run(request.param, command(folder, request.param, tier), DEADLINE_S[tier], folder)
    assert done.status == 0, "the guest timed out"
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
    valid = ("passed", SKIPPED, NO_QUEUE, NO_SHRINKING, NOT_COUNTED, *BY_CHANCE)
    assert {test: outcome for test, outcome in found.items() if outcome not in valid} == {}
    assert {"passed", SKIPPED} <= set(found.values())
