"""What a fleet does to its brokers: a real cluster of three, and simulated hosts with the producer's own client.

python -m tests.bench.simulation [--hosts 500 1000 2000] [--seconds 30] [--spread 30] [--latency 1]
    [--slower 1] [--setting reconnect.backoff.ms=100] [--only STEP ...]

For each number of hosts, prints what they cost the brokers while nothing happens, and then what follows from events:
all hosts restart at once, or spread over some seconds; a broker is restarted in order; a broker is killed and returns;
all brokers are away for a while. The topics are those of `rebpf init`, with three replicas, of which two must be in
sync. Each host (tests/bench/hosts.py) needs five threads and some 2 MB. Says if the machine was too small. With
--slower, hosts send less often, so that a small machine shows what the connections of a large fleet take.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from producer.commands.init import create_topics
from producer.config.load import Config
from tests.bench.agent import row
from tests.bench.observed import Observed
from tests.bench.simulated_fleet import Fleet
from tests.support.servers.cluster import REPLICATION, KafkaCluster

PARTITIONS = 60
DOWN_S = 10.0
"""How long a killed broker stays away."""
LONG_S = 2.0
"""A host whose deliveries are this late was interrupted."""
SETTINGS = {
    # After a broker's return, its partitions return to it soon, and not after five minutes.
    "leader.imbalance.check.interval.seconds": "5",
    "leader.imbalance.per.broker.percentage": "0",
    "broker.session.timeout.ms": "9000",  # Kafka's default
}
STEADY = (
    *("hosts", "connections of each broker", "requests/s: produce", "metadata", "cores of each broker"),
    *("us of broker CPU per produce request", "MB of each broker", "cores and MB of the hosts", "batches held"),
)
EVENTS = (
    *("hosts", "event", "s until half / all deliver", "hosts interrupted; longest, s", "most sockets opened in 1 s"),
    *("requests: ApiVersions", "Metadata", "InitProducerId", "Produce", "in s", "CPU s of brokers", "errors"),
)
STEPS = ("steady", "restart", "spread", "broker-restart", "broker-kill", "outage")


class Simulation:
    """A cluster, a fleet that sends to it, and the tables' rows."""

    def __init__(
        self,
        cluster: KafkaCluster,
        seconds: float,
        spread_s: float,
        latency_s: float,
        slower: float,
        settings: Mapping[str, str],
    ) -> None:
        self._cluster = cluster
        self._latency_s, self._slower = latency_s, slower
        self._settings = settings
        self._long_s = slower * latency_s + LONG_S
        self._seen = Observed(list(cluster.nodes.values()))
        self._seconds = seconds
        self._spread_s = spread_s
        self._idle_cores = 0.0
        self.rows: dict[Sequence[str], list[str]] = {STEADY: [], EVENTS: []}

    def idle(self) -> None:
        """Measure what the brokers use without hosts."""
        self._seen.begin()
        time.sleep(self._seconds / 2)
        self._idle_cores = sum(each.cores for each in self._seen.work())
        print(f"without hosts, the brokers use {self._idle_cores:.2f} cores", flush=True)

    def run(self, count: int, steps: Sequence[str]) -> None:
        """Simulate `count` hosts."""
        fleet = self._fleet(count)
        try:
            self._start(fleet, "first start, all at once")
            time.sleep(self._seconds / 3)
            if "steady" in steps:
                self.steady(fleet)
            for step, spread_s in (("restart", 0.0), ("spread", self._spread_s)):
                if step in steps:
                    fleet = self.restart(fleet, spread_s)
            time.sleep(self._seconds / 3)
            if "broker-restart" in steps:
                self.broker(fleet, killed=False)
            if "broker-kill" in steps:
                self.broker(fleet, killed=True)
            if "outage" in steps:
                self.outage(fleet)
        finally:
            fleet.kill()

    def steady(self, fleet: Fleet) -> None:
        """Measure while nothing happens."""
        self._seen.begin()
        before, began_s = fleet.report(), time.monotonic()
        time.sleep(self._seconds)
        after, seconds = fleet.report(), time.monotonic() - began_s
        work = self._seen.work()
        rates = sum((Counter(each.requests_per_s) for each in work), Counter())
        cores = sum(each.cores for each in work)
        used = (after.cpu_s - before.cpu_s) / seconds
        cells = (
            str(fleet.count),
            " / ".join(map(str, self._seen.connections())),
            f"{rates['Produce']:,.0f}",
            f"{rates['Metadata']:.1f}",
            " / ".join(f"{each.cores:.2f}" for each in work),
            f"{(cores - self._idle_cores) / rates['Produce'] * 1e6:.0f}",
            " / ".join(f"{each:.0f}" for each in self._seen.memory_mb()),
            f"{used:.2f}, {after.resident_mb:.0f} MB, {after.threads} threads",
            f"{after.held - before.held}",
        )
        self._print(STEADY, cells)
        if cores + used > 0.8 * (os.cpu_count() or 1):
            print(f"  the machine was busy: {cores + used:.2f} of {os.cpu_count()} cores", flush=True)

    def restart(self, old: Fleet, spread_s: float) -> Fleet:
        """Kill all hosts, start them again within `spread_s`, and return them."""
        with old:
            fleet = self._fleet(old.count, spread_s)
            fleet.wait_until_ready()
        self._start(fleet, f"all restart within {spread_s:.0f} s" if spread_s else "all restart at once")
        return fleet

    def _fleet(self, count: int, spread_s: float = 0) -> Fleet:
        return Fleet(self._cluster.bootstrap, count, spread_s, self._latency_s, self._slower, settings=self._settings)

    def _start(self, fleet: Fleet, event: str) -> None:
        self._seen.begin()
        fleet.go()
        first_s = fleet.deliver_first().first_s
        missing = f"; {fleet.count - len(first_s)} did not deliver" if len(first_s) < fleet.count else ""
        self._finish(fleet, event + missing, first_s)

    def broker(self, fleet: Fleet, *, killed: bool) -> None:
        """Restart a broker in order, or kill it and start it again."""
        broker = self._cluster.brokers[0 if killed else 1]
        self._seen.begin()
        fleet.mark()
        if killed:
            broker.kill()
            time.sleep(DOWN_S)
        else:
            broker.stop()
        broker.start()
        self._recover(fleet)
        self._finish(fleet, "a broker is killed, and returns" if killed else "a broker is restarted in order", [])

    def outage(self, fleet: Fleet) -> None:
        """Stop all brokers, and start them again."""
        self._seen.begin()
        fleet.mark()
        self._cluster.stop()
        fleet.report()
        before, began_s = len(fleet.opened_s), time.monotonic()
        time.sleep(DOWN_S)
        fleet.report()
        tries = (len(fleet.opened_s) - before) / fleet.count / (time.monotonic() - began_s)
        self._cluster.start()
        self._recover(fleet)
        self._finish(fleet, f"all brokers are away: a host tries {tries:.1f} times a second; they return", [])

    def _recover(self, fleet: Fleet) -> None:
        """Wait until all hosts deliver, and partitions have returned to their brokers."""
        fleet.wait_until(lambda report: max(report.gaps_s) < self._long_s)
        time.sleep(self._seconds / 3)

    def _finish(self, fleet: Fleet, event: str, first_s: Sequence[float]) -> None:
        """Print what an event did."""
        fleet.report()
        work = self._seen.work()
        requests = sum((each.requests for each in work), Counter())
        long_s = [each for each in fleet.gaps_s if each > self._long_s] if not first_s else []
        cells = (
            str(fleet.count),
            event,
            f"{statistics.median(first_s):.1f} / {max(first_s):.1f}" if first_s else "",
            f"{len(long_s)}; {max(fleet.gaps_s):.1f}" if not first_s else "",
            f"{fleet.most_opened_per_s()}",
            *(f"{requests[kind]:,}" for kind in ("ApiVersions", "Metadata", "InitProducerId", "Produce")),
            f"{work[0].seconds:.0f}",
            f"{sum(each.cpu_s for each in work):.1f}",
            ", ".join(f"{name} {count:.0f}" for name, count in sorted(fleet.errors.items())) or "none",
        )
        self._print(EVENTS, cells)

    def _print(self, titles: Sequence[str], cells: Sequence[str]) -> None:
        self.rows[titles].append(row(cells))
        print("; ".join(f"{title}: {cell}" for title, cell in zip(titles, cells, strict=True) if cell), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=[500, 1000, 2000])
    parser.add_argument("--seconds", type=float, default=30, help="time that is measured while nothing happens")
    parser.add_argument("--spread", type=float, default=30, help="seconds over which hosts restart in one of the steps")
    parser.add_argument("--latency", type=float, default=1, help="the hosts' capture.latency_s")
    parser.add_argument("--slower", type=float, default=1, help="times less often than quiet hosts")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of librdkafka")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    arguments = parser.parse_args()
    settings = dict(each.split("=", 1) for each in arguments.setting)
    with tempfile.TemporaryDirectory() as name, KafkaCluster(Path(name), settings=SETTINGS) as cluster:
        config = Config().with_values(kafka__brokers=cluster.bootstrap)
        print("\n".join(create_topics(config, PARTITIONS, REPLICATION)), flush=True)
        simulation = Simulation(
            cluster, arguments.seconds, arguments.spread, arguments.latency, arguments.slower, settings
        )
        simulation.idle()
        for count in arguments.hosts:
            simulation.run(count, arguments.only)
        for titles, rows in simulation.rows.items():
            print("\n".join(("", row(titles), row(["---"] * len(titles)), *rows)))


if __name__ == "__main__":
    main()
