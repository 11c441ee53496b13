"""`python -m tests.fuzz TARGET... [--seconds N] [--seed N]`: runs each target for a time, and prints the findings."""

import argparse
import logging
import os
import random
import sys
import time

from tests.fuzz.engine import run_for, signature
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Return 1 if there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"one or more of: {', '.join(TARGETS)}")
    parser.add_argument("--all-targets", action="store_true", help="all of them, one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each runs (default: 60)")
    parser.add_argument("--seed", type=int, help="seed of the first round; each later round takes the next number")
    options = parser.parse_args()
    names = list(TARGETS) if options.all_targets else options.target
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        parser.error(f"unknown target: {', '.join(unknown)}" if unknown else "name a target, or --all-targets")
    os.nice(19)
    logging.lastResort = None
    found = 0
    for name in names:
        number = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
        start = time.monotonic()
        tally, finding = run_for(TARGETS[name], options.seconds, number)
        found += finding is not None
        print(
            f"target={name} seconds={time.monotonic() - start:.0f} executions={tally.executions} "
            f"findings={int(finding is not None)} known={sum(tally.known.values())} seed={number}",
            flush=True,
        )
        if finding is not None:
            print(f"  {signature(finding)}: {finding}", *getattr(finding, "__notes__", ()), sep="\n  ", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
