"""Each target's fixed examples, and, with the extended tests, others for a while."""

import subprocess
import sys

import pytest

from tests.fuzz.engine import run_fixed
from tests.fuzz.targets import TARGETS

_EXTENDED_S = 60

# The registry's client has no close in some of its versions; many of them are made here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


_OF_ROOT = ("compiled", "reload")
"""Compiled programs, which only root keeps, and a running producer."""


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in _OF_ROOT])
def test_fixed_examples_break_nothing(name: str) -> None:
    run_fixed(TARGETS[name])


@pytest.mark.root
@pytest.mark.parametrize("name", _OF_ROOT)
def test_fixed_examples_break_nothing_that_needs_root(name: str) -> None:
    run_fixed(TARGETS[name])


@pytest.mark.extended
@pytest.mark.root
@pytest.mark.timeout(10 * _EXTENDED_S)
@pytest.mark.parametrize("name", TARGETS)
def test_other_examples_break_nothing(name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(_EXTENDED_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
