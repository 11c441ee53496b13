"""The C of native/ under gcc's sanitizers and a coverage-guided fuzzer: no input makes it touch
memory that is not its own, overflow, or leak."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/native"
PURE = [path for path in (ROOT / "native").glob("*.c") if path.name != "module.c" and not path.name.startswith("bind_")]
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'native'}")
RUNS = 10_000
"""Some seconds."""


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def fuzzer(target: str, folder: Path) -> Path:
    """Build the fuzzer of a target; the code under test has callbacks for coverage."""
    objects = [folder / f"{path.stem}.o" for path in PURE]
    for source, built in zip(PURE, objects, strict=True):
        _run("gcc", *SANITIZE, "-fsanitize-coverage=trace-pc", "-c", source, "-o", built)
    _run("gcc", *SANITIZE, TESTS / "fuzz.c", TESTS / f"fuzz_{target}.c", *objects, "-o", folder / target)
    return folder / target


@pytest.mark.parametrize("target", ["encode"])
def test_no_input_breaks_it(target: str, tmp_path: Path) -> None:
    corpus = TESTS / "corpus" / target
    assert shutil.which("gcc"), "no gcc: scripts/setup --tests installs it"
    seed = random.SystemRandom().randrange(1 << 32)
    told = _run(fuzzer(target, tmp_path), str(RUNS), str(seed), corpus)
    files, runs = (int(part.split()[0]) for part in told.split(", ")[:2])
    assert files == len(list(corpus.iterdir())) > 0
    assert runs == RUNS
