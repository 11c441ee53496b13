"""The C of native/ under gcc's sanitizers and a coverage-guided fuzzer, for a few seconds: no input makes it touch
memory that is not its own, overflow, or leak."""

import random
import shutil
from pathlib import Path

import pytest

from tests.native.build import TESTS, fuzzer, run

RUNS = 10_000
"""Some seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["decode", "encode", "tcp"])
def test_no_input_breaks_it(target: str, tmp_path: Path) -> None:
    corpus = TESTS / "corpus" / target
    assert shutil.which("gcc"), "no gcc: scripts/setup --tests installs it"
    seed = random.SystemRandom().randrange(1 << 32)
    told = run(fuzzer(target, tmp_path), str(RUNS), str(seed), corpus)
    files, runs = (int(part.split()[0]) for part in told.split(", ")[:2])
    assert files == len(list(corpus.iterdir())) > 0
    assert runs == RUNS
