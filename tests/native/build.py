"""Builds the C of native/ for its tests: with gcc's sanitizers, and with a coverage-guided fuzzer."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/native"
PURE = [path for path in (ROOT / "native").glob("*.c") if path.name != "module.c" and not path.name.startswith("bind_")]
INCLUDE = (f"-I{ROOT / 'native'}", f"-I{ROOT / 'bpf'}")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *INCLUDE)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def fuzzer(target: str, folder: Path) -> Path:
    """Build the fuzzer of a target; the code under test has callbacks for coverage."""
    objects = [folder / f"{path.stem}.o" for path in PURE]
    for source, built in zip(PURE, objects, strict=True):
        run("gcc", *SANITIZE, "-fsanitize-coverage=trace-pc", "-c", source, "-o", built)
    run("gcc", *SANITIZE, TESTS / "fuzz.c", TESTS / f"fuzz_{target}.c", *objects, "-o", folder / target)
    return folder / target
