"""The package for arm64 on an emulated machine: Debian 13 with its Linux 6.12.

There, kernel tests run with each hook, and the package's producer publishes lossy traffic to a real Kafka on this
machine. Package and BPF programs are compiled here. An emulated processor on x86-64 does not reorder memory as a real
one may, so that is not tested.
"""

import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from producer.demo.reconcile import Tally, compare, reasons
from producer.events import STREAMS
from tests.support.comparison import MAX_SEGS
from tests.support.packages import arm64_refusal, build_arm64_deb
from tests.support.rebpf import PROGRAMS, command
from tests.support.servers import fetch
from tests.vm import arm64_guest
from tests.vm.arm64_image import SUITE
from tests.vm.arm64_steps import CONFIG, RETRANSMITS
from tests.vm.systemd_kafka import GuestKafka

pytestmark = [pytest.mark.extended, pytest.mark.vm, pytest.mark.real_kafka, pytest.mark.timeout(7200)]

HOOKS = ("fentry", "kprobe", "cgroup_skb")
FILES = ("test_features.py", "test_retransmit.py")
# The valid reasons to skip a test.
SKIPPED = (
    "only the cgroup_skb hook sees segments without a socket",
    "this kernel has no netfilter queue",
    "this kernel's tracepoint does not fire for failures (before Linux 6.17)",
)
DEADLINE_S = 5400
PYTEST = "python3 -m pytest --confcutdir=tests/kernel -p no:anyio --timeout=1200 --durations=5"
COMMAND = f"""\
set -e
dpkg-deb --extract /results/rebpf.deb /
cp /usr/lib/rebpf/producer/_native.abi3.so producer/
cp /results/programs /run/programs
cp /results/rebpf.toml {CONFIG}
rebpf check --json --config {CONFIG} >/results/check.json || true
export PYTHONPATH=/usr/lib/rebpf {PROGRAMS}=/run/programs
python3 -m tests.vm.arm64_steps
"""


@dataclass(frozen=True)
class Outcome:
    """What the guest has left in its folder, and the events that it sent to Kafka."""

    folder: Path
    seen: dict[str, Any]
    events: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, and the BPF programs."""
    if reason := arm64_guest.refusal() or arm64_refusal():
        pytest.skip(f"NO ARM64 MACHINE: {reason}")
    folder = tmp_path_factory.mktemp("built")
    shutil.move(build_arm64_deb(SUITE, folder), folder / "rebpf.deb")
    (folder / "btf").write_bytes(arm64_guest.kernel_btf())
    subprocess.run(command("compile", "--btf", folder / "btf", "-o", folder / "programs"), check=True)
    return folder


@pytest.fixture(scope="module")
def outcome(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    if absent := fetch.missing():
        pytest.skip(f"NO REAL KAFKA: {', '.join(absent)} not installed (scripts/setup --tests installs them)")
    folder = tmp_path_factory.mktemp("results")
    for name in ("rebpf.deb", "programs"):
        shutil.copy(built / name, folder)
    with GuestKafka(tmp_path_factory.mktemp("kafka")) as kafka:
        kafka.make_topics()
        settings = f'kafka.brokers = "{kafka.guest_bootstrap}"\ncapture.programs = "/run/programs"\n'
        (folder / "rebpf.toml").write_text(settings)
        result = arm64_guest.run(COMMAND + kernel_tests(FILES), DEADLINE_S, folder)
        print(result.output)
        assert result.status == 0, result.output
        seen = json.loads((folder / "seen.json").read_text())
        events = {stream.topic: kafka.events(stream.topic) for stream in STREAMS}
    return Outcome(folder, seen, events)


def kernel_tests(files: tuple[str, ...]) -> str:
    """Return the commands that run test files with all hooks, two at a time: one per CPU."""
    arguments = " ".join(f"tests/kernel/{file}" for file in files)
    runs = {hook: f"/results/{hook}" for hook in HOOKS}
    fentry, *others = (
        f"REBPF_TEST_HOOKS={hook} {PYTEST} {arguments} -o cache_dir=/tmp/{hook} --junitxml={path}.xml >{path}.log 2>&1"
        for hook, path in runs.items()
    )
    return f"{fentry} &\n{{ {' ; '.join(others)}; }} &\nwait"


def test_it_is_an_arm64_machine(outcome: Outcome) -> None:
    assert outcome.seen["machine"] == "aarch64"


def test_check_finds_each_hook_available_and_no_problem(outcome: Outcome) -> None:
    findings = {each["subject"]: each for each in json.loads((outcome.folder / "check.json").read_text())}
    print(*findings.values(), sep="\n")
    for stream, hooks in (("transmit", HOOKS), ("retransmit", (*HOOKS, "raw_tp")), ("flow", ("raw_tp",))):
        for hook in hooks:
            assert findings[f"{stream} by {hook}"]["text"] == "available"
    assert [each for each in findings.values() if not each["ok"]] == []


@pytest.mark.parametrize("hook", HOOKS)
def test_kernel_tests_pass(outcome: Outcome, hook: str) -> None:
    print((outcome.folder / f"{hook}.log").read_text())
    found = outcomes(outcome.folder / f"{hook}.xml")
    assert {test: result for test, result in found.items() if result not in ("passed", *SKIPPED)} == {}
    assert "passed" in found.values()


def test_the_packages_producer_used_the_best_hooks_and_the_programs_compiled_here(outcome: Outcome) -> None:
    ready = outcome.seen["ready"]
    assert ready.items() >= {"transmit": "fentry", "retransmit": "fentry", "flow": "raw_tp"}.items()
    assert ready["programs"] == "/run/programs"


def test_the_events_in_kafka_add_up_to_the_kernels_counts(outcome: Outcome) -> None:
    tally = Tally()
    for topic, events in outcome.events.items():
        for event in events:
            tally.add(topic, event)
    comparison, balance = compare(tally, outcome.seen["counters"]), outcome.seen["balance"]
    why = reasons(tally, comparison, balance)
    print(*comparison.rows, balance, *why, sep="\n")
    nested = balance["tcp_retransmit"]["lost"].get("nested", 0)
    assert outcome.seen["status"] == 0
    assert comparison.retransmitted.counted >= RETRANSMITS
    # Only events of runs that the kernel skipped and counted may be missing.
    assert -MAX_SEGS * nested <= comparison.retransmitted.difference <= 0
    assert [row for row in comparison.rows if row.difference > 0 or (row.difference and not why)] == []
    assert comparison.first_transmissions.seen > 0.98 * comparison.first_transmissions.counted
    assert {topic: account["delivered"] for topic, account in balance.items()} == tally.events


def outcomes(report: Path) -> dict[str, str]:
    """Read pytest's report: "passed", "failed" or the reason to skip, by test."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "passed" if skipped is None else skipped.get("message", "")
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found
