"""What a profile costs a host, and a fleet: CPU, records, and bytes on the broker.

python -m tests.bench.fleet [--workload NAME ...] [--profile NAME ...] [--seconds 30] [--hosts 5000]

Runs the producer with each profile beside each workload, on a real Kafka. Prints for each the CPU and records of one
host, and the MB/s and TB of a fleet, in which each topic is kept as long as `rebpf init` sets, with three replicas.
Needs root and a C compiler.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from producer.events import STREAMS, Topic
from producer.kafka.admin import topic_settings
from producer.paths import IMPORTED_FROM
from tests.bench.contender import SETTLE_S, cpu_s, start
from tests.bench.workloads import WORKLOADS, Traffic, Workload
from tests.support.documents import ROOT
from tests.support.servers.kafka import KafkaServer

PROFILES: dict[str, str] = {path.stem: path.read_text() for path in sorted(ROOT.glob("deploy/profiles/*.toml"))}
PROFILES["flows"] = PROFILES["fleet"].replace("transmit = true", "transmit = false", 1)
"""Settings by profile. `flows` is `fleet` without transmits."""
REPLICAS = 3
PARTITIONS = 6
TITLES = ("workload", "profile", "CPU of a core", "records/s by topic", "kB/s of a host", "fleet MB/s", "fleet TB")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a run on one host: CPU, and per topic the records and the bytes stored, per second."""

    cpu: float
    records: Mapping[Topic, float]
    stored_bytes: Mapping[Topic, float]


def measure(kafka: KafkaServer, folder: Path, profile: str, workload: Workload, port: int, seconds: float) -> Cost:
    """Run the producer beside the workload."""
    config = folder / f"{profile}.toml"
    config.write_text(PROFILES[profile])
    options = ["--config", str(config), "--state-dir", str(folder / "state"), "--brokers", kafka.bootstrap]
    run = [sys.executable, "-m", "producer", "run", "--json", *options, "--port", str(port)]
    before = stored(kafka)
    with Traffic(workload, port, seconds) as traffic:
        agent, _ = start(["env", f"--chdir={IMPORTED_FROM}", *run])
        time.sleep(SETTLE_S)
        used_s = cpu_s(agent.pid)
        traffic.run()
        time.sleep(SETTLE_S)
        used_s = cpu_s(agent.pid) - used_s
    agent.send_signal(signal.SIGTERM)
    balances = json.loads(agent.communicate()[0].splitlines()[-1])
    assert all(each["passed"] == each["delivered"] for each in balances.values()), balances
    after = stored(kafka)
    return Cost(
        used_s / (seconds + SETTLE_S),
        {topic: balance["delivered"] / seconds for topic, balance in balances.items()},
        {topic: (after[topic] - before[topic]) / seconds for topic in after},
    )


def stored(kafka: KafkaServer) -> dict[Topic, int]:
    """Return the bytes of each topic on the broker."""
    data = kafka.folder / "data"
    return {stream.topic: sum(log.stat().st_size for log in data.glob(f"{stream.topic}-*/*.log")) for stream in STREAMS}


def row(workload: str, profile: str, cost: Cost, hosts: int) -> str:
    """Return a row of the table, in Markdown."""
    kept_s = {stream.topic: int(topic_settings(REPLICAS, stream.name)["retention.ms"]) / 1000 for stream in STREAMS}
    total_bytes = sum(cost.stored_bytes.values())
    kept_bytes = sum(rate * kept_s[topic] for topic, rate in cost.stored_bytes.items()) * REPLICAS
    cells = (
        workload,
        profile,
        f"{cost.cpu:.1%}",
        ", ".join(f"{topic} {rate:,.0f}" for topic, rate in cost.records.items()),
        f"{total_bytes / 1e3:,.1f}",
        f"{total_bytes * hosts / 1e6:,.1f}",
        f"{kept_bytes * hosts / 1e12:,.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["long-3000", "short-500", "quiet"])
    parser.add_argument("--profile", nargs="+", choices=PROFILES, default=["full", "fleet", "flows"])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--hosts", type=int, default=5000)
    arguments = parser.parse_args()
    port = 10_000 + os.getpid() % 10_000
    with tempfile.TemporaryDirectory() as name, KafkaServer(Path(name) / "kafka") as kafka:
        for topic in (*(stream.topic for stream in STREAMS), "rebpf_agent"):
            kafka.create_topic(topic, PARTITIONS)
        print(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}", flush=True)
        for workload in arguments.workload:
            for profile in arguments.profile:
                cost = measure(kafka, Path(name), profile, WORKLOADS[workload], port, arguments.seconds)
                print(row(workload, profile, cost, arguments.hosts), flush=True)


if __name__ == "__main__":
    main()
