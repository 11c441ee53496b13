"""`python -m tests.native TARGET [--runs N] [--keep FOLDER]`: fuzzes the C of native/ for longer than the tests do.

Inputs that reach new code are written to FOLDER: the small ones are worth a place in tests/native/corpus.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.native.build import TESTS, fuzzer


def main() -> int:
    """Return the fuzzer's exit code: not 0 after a finding, which it prints."""
    targets = sorted(path.name for path in (TESTS / "corpus").iterdir())
    parser = argparse.ArgumentParser(prog="python -m tests.native", description=__doc__)
    parser.add_argument("target", choices=targets)
    parser.add_argument("--runs", type=int, default=1_000_000, help="number of inputs (default: 1,000,000)")
    parser.add_argument("--keep", type=Path, help="folder for new inputs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        program = fuzzer(options.target, Path(name))
        seed = random.SystemRandom().randrange(1 << 32)
        arguments = [str(options.runs), str(seed), str(TESTS / "corpus" / options.target)]
        print(f"target={options.target} seed={seed}", flush=True)
        return subprocess.run([program, *arguments, *([options.keep] if options.keep else [])], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
