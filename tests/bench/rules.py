"""The cost of a segment in the kernel: captured, and left out by 1 or 1,024 rules (from the kernel's run statistics).

python -m tests.bench.rules [--seconds 1] [--rounds 5] [--before FOLDER]

All in turn in one run, each attached alone, with the same traffic on loopback. --before adds the programs of another
version: the bpf folder of a checkout. The statistics include their own cost, which the program "empty" shows.
"""

import argparse
import contextlib
import ipaddress
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from producer.events import STREAMS
from producer.host.cgroups import cgroup2_root
from producer.kernel import bpf_syscall, capture
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from producer.paths import BPF
from producer.rules.tables import Action, Rule, Tables, tables
from tests.support.programs import program_info

PORT = 9011
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
KEEP, DROP = Action(), Action(transmit=False, retransmit=False)

Counts = Callable[[], tuple[int, int]]
"""Returns the total time in ns and the number of runs."""


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


def measure(counts: Counts, seconds: float, drain: Callable[[], None] = lambda: None) -> float:
    """Return the ns per run over some seconds of traffic."""
    before = counts()
    argv = [sys.executable, str(Path(__file__).parent / "traffic.py"), "30000", str(seconds), str(PORT)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as traffic:
        while traffic.poll() is None:
            drain()
            time.sleep(0.02)
    after = counts()
    return (after[0] - before[0]) / (after[1] - before[1])


def empty(seconds: float) -> float:
    """Measure a cgroup program of two instructions."""
    root = cgroup2_root()
    assert root is not None
    program = bpf_syscall.load_program(
        "empty", bpf_syscall.RETURN_1, bpf_syscall.PROG_CGROUP_SKB, attach_type=bpf_syscall.ATTACH_CGROUP_EGRESS
    )
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    link = bpf_syscall.attach_cgroup(program, folder, bpf_syscall.ATTACH_CGROUP_EGRESS)

    def counts() -> tuple[int, int]:
        info = program_info(program)
        return info.run_time_ns, info.run_cnt

    try:
        return measure(counts, seconds)
    finally:
        bpf_syscall.close_all([link, folder, program])


def of_programs(bpf: Path, rules: Tables, cache: Path, seconds: float) -> float:
    """Measure the transmit stream's programs of a bpf folder."""
    vars(capture)["BPF"] = bpf  # a constant, except here
    with contextlib.ExitStack() as stack:
        hooks = stack.enter_context(Capture(CaptureSettings(rules=rules, cache=cache)))
        hooks.load()
        hooks.attach()
        rings = [stack.enter_context(hooks.ring(stream)) for stream in STREAMS]

        def drain() -> None:
            for ring in rings:
                ring.read(1 << 20)
                ring.commit(ring.position)

        def counts() -> tuple[int, int]:
            infos = list(map(program_info, hooks._programs[STREAMS[0].name]))
            return sum(info.run_time_ns for info in infos), sum(info.run_cnt for info in infos)

        cost = measure(counts, seconds, drain)
        hooks.detach()
        return cost


@contextlib.contextmanager
def statistics_on() -> Iterator[None]:
    """Let the kernel measure its BPF programs."""
    before = STATS.read_text()
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text(before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    versions = {"": BPF} | ({"before: ": arguments.before.resolve()} if arguments.before else {})
    costs: dict[str, list[float]] = {}
    with statistics_on(), tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            costs.setdefault("empty", []).append(empty(arguments.seconds))
            for case, rules in CASES.items():
                for version, bpf in versions.items():
                    cost = of_programs(bpf, rules, Path(folder) / "cache", arguments.seconds)
                    costs.setdefault(version + case, []).append(cost)
    for name, values in costs.items():
        above = statistics.median(cost - base for cost, base in zip(values, costs["empty"], strict=True))
        print(f"{name}: {statistics.median(values):.0f} ns a segment, {above:.0f} above empty, least {min(values):.0f}")


if __name__ == "__main__":
    main()
