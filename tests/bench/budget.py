"""The budget for transmits: what 60,000 events/s of 1,000 flows cost with it, and how far scaled sums are off.

python -m tests.bench.budget [--seconds 60] [--budget 1000] [--rate 60000]

First the producer with as many events as the budget allows, and no budget; then with the budget and --rate. Prints the
CPU of both, and the segments by the events, each counted sample_rate times, beside those of the kernel (OutSegs). The
broker is librdkafka's mock in this process. Needs root and a C compiler.
"""

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka import Consumer, TopicPartition

from producer.consume.decode import Decoder
from producer.events import HEARTBEATS, RETRANSMITS, TRANSMITS
from tests.bench.contender import SETTLE_S, cpu_s, start, stop
from tests.bench.workloads import Traffic, Workload
from tests.support.mock_cluster import Cluster

FLOWS = 1_000
_RST = 4


class Sums:
    """Sums the events of the transmit topic while they arrive: mock brokers forget what is old."""

    def __init__(self, brokers: str) -> None:
        self.events = self.segments = 0
        self._decoder = Decoder(None)
        self._consumer = Consumer(
            {"bootstrap.servers": brokers, "group.id": "budget"}, logger=logging.getLogger("consumer")
        )
        self._consumer.assign([TopicPartition(TRANSMITS.topic, 0, 0)])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        while (messages := self._consumer.consume(10_000, timeout=1)) or not self._ended.is_set():
            values = [each.value() for each in messages if not each.error()]
            for record in self._decoder.records(values):
                if not isinstance(record, dict):
                    raise record
                self.events += 1
                # The connections are open before the kernel's count begins, and close after it has ended.
                if record["state"] == "ESTABLISHED" and not record["tcp_flags"] & _RST and not record["is_retransmit"]:
                    self.segments += record["segs"] * record["sample_rate"]

    def end(self) -> None:
        """Stop following after a second without messages."""
        self._ended.set()
        self._thread.join()
        self._consumer.close()


def run(workload: Workload, config: str, seconds: float, folder: Path) -> tuple[float, int, Sums]:
    """Run the producer beside the workload; return its CPU in seconds, the kernel's segments, and the events' sums."""
    port = 10_000 + os.getpid() % 10_000
    folder.mkdir()
    (folder / "rebpf.toml").write_text(config)
    with Traffic(workload, port, seconds) as traffic:
        cluster = Cluster()
        for topic in (TRANSMITS.topic, RETRANSMITS.topic, HEARTBEATS.topic):
            cluster.create(topic)
        agent, _ = start(command(folder, cluster.brokers, port))
        time.sleep(SETTLE_S)
        sums, before = Sums(cluster.brokers), cpu_s(agent.pid)
        segments = traffic.run()
        time.sleep(2 * SETTLE_S)
        used_s = cpu_s(agent.pid) - before
        stop(agent)
        sums.end()
    return used_s, segments, sums


def command(folder: Path, brokers: str, port: int) -> Sequence[str]:
    """Return the producer's command line."""
    options = ["--config", str(folder / "rebpf.toml"), "--state-dir", str(folder / "state"), "--brokers", brokers]
    return [sys.executable, "-m", "producer", "run", "--json", *options, "--port", str(port)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--budget", type=int, default=1_000)
    parser.add_argument("--rate", type=int, default=60_000)
    arguments = parser.parse_args()
    cases = {
        f"{arguments.budget:,} events/s, no budget": (arguments.budget, ""),
        f"{arguments.rate:,} events/s, budget {arguments.budget:,}": (
            arguments.rate,
            f"capture.transmit_events_per_s = {arguments.budget}\n",
        ),
    }
    with tempfile.TemporaryDirectory() as name:
        for number, (case, (rate, config)) in enumerate(cases.items()):
            workload = Workload(case, rate=rate, connections=FLOWS // 2)
            used_s, segments, sums = run(workload, config, arguments.seconds, Path(name) / str(number))
            share, events_per_s = used_s / arguments.seconds, sums.events / arguments.seconds
            print(f"{case}: {share:.2%} of a core, {events_per_s:,.0f} events/s published")
            print(f"  segments {sums.segments:,} of {segments:,}: {sums.segments / segments - 1:+.2%}", flush=True)


if __name__ == "__main__":
    main()
