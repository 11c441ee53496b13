"""Whole agents beside each other: the producer, an agent in Go (tests/bench/goagent) and a baseline in Python.

python -m tests.bench.agent [--quick] [--workload NAME ...] [--partitions 6|60] [--rounds 5] [--seconds 10]

All capture the same traffic for the same real Kafka, in turn, in rounds. Prints for each workload a table of medians:
CPU per event and its ratio to the Go agent's, round by round; produce requests a second; memory; the ages of events
at a consumer; bytes per event on the broker, at the agent's default compression and with lz4 and zstd; events lost.

--tree adds the producer of another checkout, such as the one before a change, in which its native module is built.
--other adds an agent: a command that gets brokers, port and codec as arguments ("" is its default), prints "ready" to
standard error, and ends on SIGTERM with a balance like that of `rebpf run --json`. Needs root, a C compiler and Go.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from producer.paths import IMPORTED_FROM
from tests.bench.broker import Broker
from tests.bench.contender import SETTLE_S, Result, measure, start, stop
from tests.bench.workloads import MILLION_S, WORKLOADS, Workload
from tests.support.servers.kafka import KafkaServer

BAR = "go"
CODECS = ("lz4", "zstd")
QUICK_S = 3.0
STORED = ("long-60000", "short-2000")
"""Workloads that are also measured with each codec."""
TITLES = (
    *("agent", "CPU us/event", "times go", "share of a core", "requests/s", "MB anonymous", "MB resident"),
    *("ms transmit p50 / p99", "ms retransmit p50 / p99", "bytes/event", "lz4 / zstd", "lost", "s to ready / CPU"),
)
Command = Callable[[str], Sequence[str]]
"""From a codec to an agent's command line."""


class Bench:
    """Measures contenders beside workloads, and prints."""

    def __init__(self, contenders: Mapping[str, Command], broker: Broker, port: int) -> None:
        self._contenders = contenders
        self._broker = broker
        self._port = port

    def compare(self, name: str, seconds: float, rounds: int, *, codecs: bool) -> None:
        """Measure all contenders in rounds, then once with each codec, and print the table."""
        workload = WORKLOADS[name]
        results: dict[str, list[Result]] = {contender: [] for contender in self._contenders}
        for _ in range(rounds):
            for contender, command in self._contenders.items():
                result = measure(command(""), workload, self._port, seconds, self._broker)
                results[contender].append(result)
                print(f"  {name} {contender}: {one_line(result)}", flush=True)
        stored: dict[str, list[float]] = {contender: [] for contender in self._contenders}
        for contender, command in self._contenders.items():
            for codec in CODECS if codecs else ():
                result = measure(command(codec), workload, self._port, min(seconds, 5), self._broker)
                stored[contender].append(result.stored_bytes / max(result.delivered, 1))
        print(table(name, workload, results, stored), flush=True)


def one_line(result: Result) -> str:
    """Return the main figures of a run."""
    return (
        f"{result.us_per_event:.2f} us/event, {result.delivered} of {result.segments} segments, {result.lost} lost, "
        f"ready in {result.start_s:.2f} s"
    )


def table(
    name: str, workload: Workload, results: Mapping[str, Sequence[Result]], stored: Mapping[str, Sequence[float]]
) -> str:
    """Return a workload's figures in Markdown."""
    some = next(iter(results.values()))
    head = f"\n{name}: {workload.what}; medians of {len(some)} rounds of {some[0].seconds:.0f} s\n"
    lines = [head, row(TITLES), row(["---"] * len(TITLES))]
    lines += [
        row([contender, *cells(results[contender], results.get(BAR), stored[contender])]) for contender in results
    ]
    return "\n".join(lines) + "\n"


def row(texts: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(texts)} |"


def cells(results: Sequence[Result], bar: Sequence[Result] | None, stored: Sequence[float]) -> list[str]:
    """Return a contender's figures, in the order of the titles."""

    def median(figure: Callable[[Result], float]) -> float:
        return statistics.median(map(figure, results))

    ratios = [each.us_per_event / other.us_per_event for each, other in zip(results, bar or (), strict=bool(bar))]
    return [
        f"{median(lambda r: r.us_per_event):.2f}",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{median(lambda r: r.cpu_s / (r.seconds + SETTLE_S)):.2%}",
        f"{median(lambda r: r.requests / r.seconds):.1f}",
        f"{median(lambda r: r.anon_mb):.0f}",
        f"{median(lambda r: r.rss_mb):.0f}",
        *(quantiles([age for each in results for age in each.ages_ms[topic]]) for topic in results[0].ages_ms),
        f"{median(lambda r: r.stored_bytes / max(r.delivered, 1)):.1f}",
        " / ".join(f"{each:.1f}" for each in stored),
        f"{median(lambda r: r.lost / max(r.lost + r.delivered, 1)):.1%}",
        f"{median(lambda r: r.start_s):.2f} / {median(lambda r: r.start_cpu_s):.2f}",
    ]


def quantiles(ages_ms: Sequence[float]) -> str:
    """Return the median and the 99th percentile, of few values the largest."""
    if not ages_ms:
        return ""
    ordered = sorted(ages_ms)
    return f"{statistics.median(ordered):.0f} / {ordered[int(len(ordered) * 0.99)]:.0f}"


def rebpf(tree: Path, folder: Path, brokers: str, port: int) -> Command:
    """Return the command lines of a checkout's producer, with its state in the folder."""
    folder.mkdir()

    def command(codec: str) -> Sequence[str]:
        config = folder / f"rebpf{codec}.toml"
        config.write_text(f'[kafka.settings]\n"compression.codec" = "{codec}"\n' if codec else "")
        options = ["--config", str(config), "--state-dir", str(folder / "state"), "--brokers", brokers]
        run = [sys.executable, "-m", "producer", "run", "--json", *options, "--port", str(port)]
        return ["env", f"--chdir={tree}", *run]

    return command


def other(command: str, brokers: str, port: int) -> Command:
    """Return the command lines of another agent."""
    return lambda codec: [*shlex.split(command), brokers, str(port), codec]


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--quick", action="store_true", help="one short round of each workload but `million`")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out these agents")
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse()
    port = 10_000 + os.getpid() % 10_000  # another run at the same time has another one
    with (
        tempfile.TemporaryDirectory() as name,
        KafkaServer(Path(name) / "kafka") as kafka,
        Broker(kafka, arguments.partitions) as broker,
    ):
        python = f"{sys.executable} -m tests.bench"
        contenders = {
            "rebpf": rebpf(IMPORTED_FROM, Path(name) / "rebpf", broker.bootstrap, port),
            BAR: other(f"{python}.goagent", broker.bootstrap, port),
            "baseline": other(f"{python}.baseline", broker.bootstrap, port),
        }
        for each in arguments.tree:
            added, _, tree = each.partition("=")
            contenders[added] = rebpf(Path(tree), Path(name) / added, broker.bootstrap, port)
        for each in arguments.other:
            added, _, command = each.partition("=")
            contenders[added] = other(command, broker.bootstrap, port)
        contenders = {each: command for each, command in contenders.items() if each not in arguments.without}
        for each, command in contenders.items():
            agent, start_s = start(command(""))
            stop(agent)
            print(f"{each}: ready in {start_s:.2f} s the first time, programs compiled", flush=True)
        broker.work()
        print(f"{arguments.partitions} partitions")
        bench = Bench(contenders, broker, port)
        for workload in arguments.workload:
            if workload == "million":
                if not arguments.quick:
                    bench.compare(workload, MILLION_S, 1, codecs=False)
            elif arguments.quick:
                bench.compare(workload, QUICK_S, 1, codecs=workload == STORED[0])
            else:
                bench.compare(workload, arguments.seconds, arguments.rounds, codecs=workload in STORED)


if __name__ == "__main__":
    main()
