"""The cost of a segment in the kernel: captured, and dropped by 1 or 1,024 rules (from the kernel's run statistics).

python -m tests.bench.rules [--seconds 3] [--rounds 3]

All three in turn in one run, with the same programs and the same traffic on loopback; ratios are pair by pair.
"""

import argparse
import ipaddress
import statistics
import subprocess
import sys
import time
from pathlib import Path

from producer.events import STREAMS
from producer.kernel.capture import Capture, CaptureSettings
from producer.rules.tables import Action, Rule, Tables, tables

PORT = 9011
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
KEEP, DROP = Action(), Action(transmit=False, retransmit=False)


def others(count: int) -> list[Rule]:
    """Return rules for other flows, each with a different network, port and owner."""
    return [
        Rule(
            str(i),
            KEEP,
            remote_address=(ipaddress.ip_network(f"10.{i // 256}.{i % 256}.0/24"),),
            local_port=((20_000 + i, 20_000 + i),),
            uid=(100_000 + i,),
        )
        for i in range(count)
    ]


CASES: dict[str, Tables] = {
    "left out by 1 rule": tables(others(1), DROP),
    "left out by 1,024 rules": tables(others(1024), DROP),
    "captured": tables([], KEEP),
}


def runs(hooks: Capture) -> tuple[int, int]:
    """Return the total time in ns and the number of runs of the transmit stream's programs."""
    infos = hooks.program_infos(STREAMS[0])
    return sum(info.run_time_ns for info in infos), sum(info.run_cnt for info in infos)


def measure(hooks: Capture, seconds: float) -> float:
    """Return the ns per run over some seconds of traffic."""
    rings = [hooks.ring(stream) for stream in STREAMS]
    before = runs(hooks)
    traffic = subprocess.Popen([sys.executable, Path(__file__).parent / "traffic.py", "30000", str(seconds), str(PORT)])
    while traffic.poll() is None:
        for ring in rings:
            ring.read(1 << 20)
            ring.commit(ring.position)
        time.sleep(0.02)
    after = runs(hooks)
    for ring in rings:
        ring.close()
    return (after[0] - before[0]) / (after[1] - before[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    stats_before = STATS.read_text()
    costs: dict[str, list[float]] = {name: [] for name in CASES}
    try:
        STATS.write_text("1")
        with Capture(CaptureSettings()) as hooks:
            hooks.load()
            hooks.attach()
            print("hooks:", hooks.hooks_in_use)
            for _ in range(arguments.rounds):
                for name, rules in CASES.items():
                    hooks.put_rules(rules)
                    costs[name].append(measure(hooks, arguments.seconds))
    finally:
        STATS.write_text(stats_before)
    first = next(iter(costs.values()))
    for name, values in costs.items():
        ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
        print(f"{name}: {statistics.median(values):.0f} ns a segment, {ratio:.2f} times the first")


if __name__ == "__main__":
    main()
