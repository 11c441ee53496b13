"""CPU per event of whole agents: the producer, a baseline written the obvious way, and any others that are given.

python -m tests.bench.agent [--sends 35000] [--seconds 15] [--rounds 3] [--other NAME=COMMAND ...]

All capture the same loopback traffic for the same real Kafka, in turn, in rounds. A command gets the brokers and the
port as arguments, prints "ready" to standard error, and ends on SIGTERM with a balance like that of `rebpf run --json`.

A Go program that does the same job (needs Go): --other go="python -m tests.bench.goagent".
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.servers.kafka import KafkaServer

PORT = 9010
TICKS = os.sysconf("SC_CLK_TCK")
HERE = Path(__file__).parent


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process, without pages of files and rings."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measure(command: list[str], sends: int, seconds: float) -> tuple[float, float, int, int]:
    """Return microseconds of CPU per delivered event, MB of memory, events delivered, and events passed."""
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert agent.stderr
    assert agent.stdout
    said = ""
    for line in agent.stderr:
        said += line
        if "ready" in line:
            break
    else:
        raise RuntimeError(f"{command} ended before it was ready: {said}")
    before = cpu_s(agent.pid)
    traffic = [sys.executable, HERE / "traffic.py", str(sends), str(seconds), str(PORT)]
    with subprocess.Popen(traffic, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as sending:
        sending.wait()
    memory, after = rss_mb(agent.pid), cpu_s(agent.pid)
    agent.send_signal(signal.SIGTERM)
    balance_line = agent.communicate()[0].splitlines()[-1]
    totals = json.loads(balance_line).values()
    delivered, passed = (sum(each[name] for each in totals) for name in ("delivered", "passed"))
    return (after - before) / delivered * 1e6, memory, delivered, passed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sends", type=int, default=35_000, help="segments sent a second, before acknowledgements")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, KafkaServer(Path(folder) / "kafka", num_partitions=6) as kafka:
        for topic in ("tcp_transmit", "tcp_retransmit"):
            kafka.create_topic(topic, 6)
        rebpf = [sys.executable, "-m", "producer", "run", "--json", "--state-dir", f"{folder}/state"]
        contenders = {
            "rebpf": [*rebpf, "--brokers", kafka.bootstrap, "--port", str(PORT)],
            "obvious": [sys.executable, "-m", "tests.bench.obvious", kafka.bootstrap, str(PORT)],
        }
        for other in arguments.other:
            name, _, command = other.partition("=")
            contenders[name] = [*shlex.split(command), kafka.bootstrap, str(PORT)]
        compare(contenders, arguments.sends, arguments.seconds, arguments.rounds)


def compare(contenders: dict[str, list[str]], sends: int, seconds: float, rounds: int) -> None:
    """Measure all contenders in turn, and print each one's median and its ratio to the first, pair by pair."""
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, command in contenders.items():
            cost, memory, delivered, passed = measure(command, sends, seconds)
            costs[name].append(cost)
            rate = delivered / seconds
            print(
                f"{name}: {cost:.2f} us/event, {rate:.0f} events/s of {passed / seconds:.0f}, {memory:.0f} MB",
                flush=True,
            )
    first = next(iter(costs))
    for name, values in costs.items():
        ratios = [value / base for value, base in zip(values, costs[first], strict=True)]
        print(f"median {name}: {statistics.median(values):.2f} us/event, {statistics.median(ratios):.2f} times {first}")


if __name__ == "__main__":
    main()
