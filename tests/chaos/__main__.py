"""`python -m tests.chaos --minutes N --events-per-s N --seed N`: a chaos run. Exits with 1 if there are findings."""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="duration (default: %(default)s)")
    parser.add_argument("--events-per-s", type=float, default=20_000.0, help="traffic (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the actions and their order (default: random)")
    parser.add_argument("--report", type=Path, help="write the JSON report to this file (default: print it)")
    parser.add_argument("--keep", type=Path, help="keep logs and data in this folder (default: a temporary one)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("BPF programs, namespaces and mounts need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that mounts and cgroups are removed
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="rebpf-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = run(folder.resolve(), options.minutes, options.events_per_s, seed)
    text = json.dumps(report, indent=2)
    if options.report:
        options.report.write_text(text + "\n")
    else:
        print(text)
    actions = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in sorted(report["actions"].items()))
    print(f"seed={seed} seconds={report['seconds']} events={report['events']} events_per_s={report['events_per_s']}")
    print(f"actions: {actions}")
    for topic, counts in report["topics"].items():
        print(f"{topic}: " + " ".join(f"{name}={count}" for name, count in counts.items()))
    print(f"starts={report['starts']} longest_step_s={report['longest_step_s']} findings={len(report['findings'])}")
    for finding in report["findings"]:
        print(f"  [{finding['at_s']}] {finding['what']}: {finding['detail']}")
    return int(bool(report["findings"]))


if __name__ == "__main__":
    sys.exit(main())
