"""What one producer sends to its brokers: requests by kind and by topic, records, bytes, and connections.

python -m tests.bench.one_host [--workload quiet idle] [--profile fleet] [--seconds 60]

Runs the producer beside each workload on a real Kafka, and prints what the broker counted. tests/bench/hosts.py repeats
it for many hosts. Needs root and a C compiler.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from producer.commands.init import create_topics
from producer.config.load import Config
from producer.events import HEARTBEATS, STREAMS
from producer.paths import IMPORTED_FROM
from tests.bench.contender import SETTLE_S, start
from tests.bench.fleet import PROFILES
from tests.bench.jmx import Jmx
from tests.bench.workloads import WORKLOADS, Traffic
from tests.support.servers.kafka import KafkaServer

PARTITIONS = 60
TOPICS = tuple(feed.topic for feed in (*STREAMS, HEARTBEATS))
BY_TOPIC = {"TotalProduceRequestsPerSec": "requests", "MessagesInPerSec": "records", "BytesInPerSec": "bytes"}
OF_BROKERS = frozenset({"BrokerHeartbeat", "Fetch", "AllocateProducerIds", "BrokerRegistration"})
"""Kinds of requests that a broker sends."""


def by_topic(jmx: Jmx) -> dict[tuple[str, str], float]:
    """Return what the broker has counted, by topic and what."""
    names = [f"kafka.server:type=BrokerTopicMetrics,name={name},topic={topic}" for name in BY_TOPIC for topic in TOPICS]
    found = {}
    for name, count in jmx.read(names).items():
        parts = dict(part.split("=", 1) for part in name.partition(":")[2].rpartition(":")[0].split(","))
        found[parts["topic"], BY_TOPIC[parts["name"]]] = count
    return found


def connections(port: int) -> int:
    """Return the connections of librdkafka to a port of 127.0.0.1; those of Java are IPv6 sockets."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(remote.endswith(f":{port:04X}") and state == "01" for _, _, remote, state, *_ in lines)


def port_of(address: str) -> int:
    """Return the port of an address."""
    return int(address.rpartition(":")[2])


def measure(kafka: KafkaServer, folder: Path, profile: str, workload: str, seconds: float) -> None:
    """Run the producer beside the workload, and print what the broker has counted in between."""
    config = folder / f"{profile}.toml"
    config.write_text(PROFILES[profile])
    port = 10_000 + os.getpid() % 10_000
    options = ["--config", str(config), "--state-dir", str(folder / "state"), "--brokers", kafka.bootstrap]
    run = [sys.executable, "-m", "producer", "run", *options, "--port", str(port)]
    jmx = Jmx(kafka.pid)
    others = connections(port_of(kafka.bootstrap))
    idle = jmx.requests()
    with Traffic(WORKLOADS[workload], port, seconds + 2 * SETTLE_S) as traffic:
        agent, _ = start(["env", f"--chdir={IMPORTED_FROM}", *run])
        at_start = jmx.requests() - idle
        before, topics_before, began = jmx.requests(), by_topic(jmx), time.monotonic()
        traffic.run()
        after, topics_after, seconds = jmx.requests(), by_topic(jmx), time.monotonic() - began
        mine = connections(port_of(kafka.bootstrap)) - others
    agent.send_signal(signal.SIGTERM)
    agent.communicate()
    topics = {key: count - topics_before.get(key, 0) for key, count in topics_after.items()}
    print(f"{workload}, profile {profile}: {mine} connections; at the start {requests(at_start)}")
    print(f"in {seconds:.0f} s: {requests(after - before)}")
    for topic in TOPICS:
        print(f"  {topic}: {per_second(topics, topic, seconds)}", flush=True)


def requests(counts: Mapping[str, int]) -> str:
    """Return requests of clients in words."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()) if count and kind not in OF_BROKERS)


def per_second(topics: Mapping[tuple[str, str], float], topic: str, seconds: float) -> str:
    """Return a topic's figures in words."""
    return ", ".join(f"{topics.get((topic, what), 0) / seconds:.2f} {what}/s" for what in BY_TOPIC.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["quiet", "idle"])
    parser.add_argument("--profile", nargs="+", choices=PROFILES, default=["fleet"])
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, KafkaServer(Path(name) / "kafka") as kafka:
        create_topics(Config().with_values(kafka__brokers=kafka.bootstrap), PARTITIONS, 1)
        for workload in arguments.workload:
            for profile in arguments.profile:
                measure(kafka, Path(name), profile, workload, arguments.seconds)


if __name__ == "__main__":
    main()
