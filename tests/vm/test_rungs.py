"""The kernel tests on the rungs that need another kernel than this machine may have: fentry and kprobe.

REBPF_TEST_KERNELS names the Debian releases whose kernels are booted, `bookworm` (6.1) unless told otherwise:
REBPF_TEST_KERNELS=bookworm,trixie.
"""

import os
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vm import guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1500)]

KERNELS = os.environ.get("REBPF_TEST_KERNELS", "bookworm").split(",")
# What the rung makes no difference to is left to the machine's own kernel, or to one rung: a load costs ten seconds here.
LEFT_OUT = {
    "fentry": ("test_lab.py", "test_demo.py"),
    "kprobe": ("test_lab.py", "test_demo.py", "test_lifecycle.py"),
}
DEADLINE_S = 1200


def command(results: Path) -> str:
    """One boot runs both rungs' tests, since it costs as much as some of them."""
    lines = []
    for rung, files in LEFT_OUT.items():
        ignore = " ".join(f"--ignore=tests/kernel/{file}" for file in files)
        pytest_command = (
            f"{sys.executable} -m pytest tests/kernel {ignore} -p no:cacheprovider --timeout=400 --durations=5"
        )
        lines.append(f"REBPF_TEST_HOOKS={rung} {pytest_command} --junitxml={results}/{rung}.xml")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Report:
    """What pytest said of one rung: the tests by outcome."""

    passed: list[str]
    skipped: list[str]
    failed: list[str]


@pytest.fixture(scope="module", params=KERNELS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with pytest's reports, one for each rung, from the guest."""
    if reason := guest.refusal():
        pytest.skip(f"NO VIRTUAL MACHINE: {reason}")
    folder = tmp_path_factory.mktemp(request.param)
    print(guest.run(request.param, command(folder), DEADLINE_S, folder).output)
    return folder


def read_report(path: Path) -> Report:
    outcomes: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    return Report(**outcomes)


@pytest.mark.parametrize("rung", LEFT_OUT)
def test_kernel_tests_pass(results: Path, rung: str) -> None:
    report = read_report(results / f"{rung}.xml")
    assert report.failed == []
    assert report.passed != []
