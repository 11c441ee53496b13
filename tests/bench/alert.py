"""The cost of reading: CPU per record of `rebpf alert` that catches up, and per message of `rebpf verify`.

python -m tests.bench.alert [--rounds 45] [--repeat 5] [--engine] [--mock] [--tree FOLDER]...

Synthetic events of 20 hosts and 500 flows, and as many flow records of 20 hosts with 3,000 open connections each, of
which a tenth retransmits between two records: in six partitions of each topic of a real Kafka. `verify` reads all, and
`alert` the flow records, with rules by host (ratio) and by peer (data_ratio). With --mock, only `verify` reads, from
four partitions of librdkafka's mock broker in this process, which keeps 5 MB of each and finds no offsets by time.
Each reader is a separate process; CPU is its total, all threads, less that of a run that reads nothing. Other checkouts
(--tree) read the same records in turn with this one; each needs its native module built.
"""

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from producer.alert.engine import Engine
from producer.alert.model import Counts
from producer.config.load import AlertRule
from producer.consume.decode import Decoder
from producer.encode.batch import BatchEncoder
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Batch, SchemaId, Stream
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from tests.bench.stages import ROWS, messages, rows
from tests.support.flows import MS, Flow, row
from tests.support.mock_topics import Cluster
from tests.support.rebpf import command, wait_until
from tests.support.servers.kafka import KafkaServer

ROOT = Path(__file__).resolve().parents[2]
HOSTS, PARTITIONS, PREFIX = 20, 6, "bench."
ROUND = ROWS + ROWS // 10
"""Transmits of one host, and a tenth of them again as retransmits."""
TOPICS = ("tcp_transmit", "tcp_retransmit")
CONNECTIONS = 3000
CONFIG = """
kafka.brokers = "{brokers}"
kafka.topic_prefix = "{prefix}"
alert.group = "{group}"
alert.missed_heartbeats = 0
alert.listen = ""
[[alert.rules]]
name = "loss"
by = "host"
measure = "ratio"
window_s = 10
threshold = 0.0005
clear = 0.0001
[[alert.rules]]
name = "peer"
by = "peer"
measure = "data_ratio"
window_s = 10
threshold = 0.9
"""


def fill(bootstrap: str, prefix: str, rounds: int) -> None:
    """Produce this many rounds of events, over a past minute."""
    client = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 50})
    made = rows()
    step_ns = 60_000_000_000 // max(1, rounds * ROWS)
    at_ns = time.time_ns() - 200_000_000_000
    for number in range(rounds):
        for stream, some in ((TRANSMITS, made), (RETRANSMITS, retransmits(made[: ROWS // 10]))):
            some["s"]["ts"] = at_ns + np.arange(len(some)) * step_ns
            some["s"]["cpu_seq"] = number * ROWS + 1 + np.arange(len(some))
            batch = encoder(stream, number % HOSTS).encode(Batch(stream, some), 0)
            keys = batch.keys.tobytes()
            starts = zip(batch.key_starts, batch.key_lengths, strict=True)
            for value, (start, size) in zip(messages(batch), starts, strict=True):
                client.produce(prefix + stream.topic, value, keys[start : start + size])
        assert client.flush(60) == 0
        at_ns += ROWS * step_ns


def flow_rounds(rounds: int, start_ns: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield each host's number, and a record of each of its connections: `rounds` times, in turn."""
    one = Flow("", 1, start_ns // MS, start_ns // MS, 0, {"fast": 0}, srtt_us=20_000)
    encoders = [encoder(FLOWS, host) for host in range(HOSTS)]
    some = np.repeat(row(one, 1), CONNECTIONS)
    numbers = np.arange(CONNECTIONS)
    some["flow"]["sk_cookie"], some["flow"]["daddr"][:, 15] = numbers + 1, numbers % 200
    for number in range(1, rounds + 1):
        some["ts"] = start_ns + number * 10_000_000_000 + numbers * 1_000_000
        some["segs_out"], some["data_segs_out"] = 100 * number, 50 * number
        some["retrans_fast"] += (numbers + number) % 10 == 0
        some["cpu_seq"] = number * CONNECTIONS + 1 + numbers
        for host, each in enumerate(encoders):
            yield host, list(messages(each.encode(Batch(FLOWS, some), 0)))


def fill_flows(bootstrap: str, prefix: str, rounds: int) -> None:
    """Produce flow records, so old that only a member that starts with the earliest ones reads them."""
    client = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 50})
    start_ns = time.time_ns() - (rounds + 360) * 10_000_000_000
    for host, values in flow_rounds(rounds, start_ns):
        for value in values:
            client.produce(f"{prefix}tcp_flow", value, f"host-{host:04}.example", timestamp=start_ns // 1_000_000)
        assert client.flush(60) == 0


def engine_us(rounds: int) -> float:
    """Return the CPU of decoding and evaluating a flow record, without Kafka, in microseconds."""
    start_ns = 1_800_000_000 * 10**9
    rules = tomllib.loads(CONFIG)["alert"]["rules"]
    decoder = Decoder(None)
    engine = Engine([AlertRule(**rule) for rule in rules], [], start_ns, start_ns, decoder, Counts())
    batches = [values for _, values in flow_rounds(rounds, start_ns)]
    now_ns = start_ns + (rounds + 10) * 10_000_000_000
    spent_s = -time.process_time()
    for values in batches:
        engine.put(FLOWS, values, now_ns)
    assert engine.decide(now_ns)
    spent_s += time.process_time()
    assert engine.counts.read == sum(map(len, batches))
    return spent_s / engine.counts.read * 1e6


def retransmits(transmits: np.ndarray) -> np.ndarray:
    made = np.zeros(len(transmits), RETRANSMITS.dtype)
    made["s"] = transmits["s"]
    return made


def encoder(stream: Stream, host: int) -> BatchEncoder:
    names = {"host": f"host-{host:04}.example", "boot_id": f"5e4a1cde-0000-4000-8000-{host:012}"}
    return BatchEncoder(
        stream, load_schema(stream.schema_file), SchemaId(stream.fixed_schema_id), names, CgroupPaths(None)
    )


class Reading:
    """Topics with `rounds` rounds of events at a broker, and their readers."""

    def __init__(self, folder: Path, bootstrap: str, rounds: int) -> None:
        self.events = rounds * ROUND
        rounds_of_flows = max(1, self.events // (HOSTS * CONNECTIONS))
        self.flows = rounds_of_flows * HOSTS * CONNECTIONS
        self._folder, self._bootstrap, self._groups = folder, bootstrap, count()
        self._admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
        fill(bootstrap, PREFIX, rounds)
        fill_flows(bootstrap, PREFIX, rounds_of_flows)

    def _alert_cpu_s(self, tree: Path, *, idle: bool) -> float:
        """Run a member until it has processed all flow records, or from their end; return its CPU seconds."""
        group = f"{PREFIX}{next(self._groups)}"
        log = self._folder / f"{group}.log"
        arguments = command("alert", "--config", self._config(group), *([] if idle else ["--from-beginning"]))
        with log.open("wb") as err:
            member = subprocess.Popen(arguments, stdout=err, stderr=err, cwd=tree)
        wait_until("active", lambda: " active " in log.read_text())
        while not idle and self._processed(group) < self.flows:
            time.sleep(0.2)
        member.terminate()
        return _cpu_s(member, log)

    def alert_us(self, tree: Path) -> float:
        """Return the CPU of `rebpf alert` per flow record, in microseconds."""
        return (self._alert_cpu_s(tree, idle=False) - self._alert_cpu_s(tree, idle=True)) / self.flows * 1e6

    def verify_us(self, tree: Path) -> float:
        """Return the CPU of `rebpf verify` per message, in microseconds."""
        (spent_s, count), (idle_s, _) = (self._verify_cpu_s(tree, idle=idle) for idle in (False, True))
        return (spent_s - idle_s) / count * 1e6

    def _verify_cpu_s(self, tree: Path, *, idle: bool) -> tuple[float, int]:
        """Run `rebpf verify` on all messages or none; return its CPU seconds, and how many it has read."""
        log = self._folder / "verify.log"
        since = ["--since-offset", str(1 << 40)] if idle else []
        with log.open("wb") as err:
            arguments = command("verify", "--config", self._config("verify"), *since)
            spent_s = _cpu_s(subprocess.Popen(arguments, stdout=err, stderr=err, cwd=tree), log)
        return spent_s, sum(map(int, re.findall(r" messages=(\d+)", log.read_text())))

    def _config(self, group: str) -> Path:
        path = self._folder / f"{group}.toml"
        path.write_text(CONFIG.format(brokers=self._bootstrap, prefix=PREFIX, group=group))
        return path

    def _processed(self, group: str) -> int:
        """Return how many flow records the group has processed."""
        topics = self._admin.list_topics(timeout=10).topics
        partitions = [TopicPartition(f"{PREFIX}tcp_flow", number) for number in topics[f"{PREFIX}tcp_flow"].partitions]
        asked = [ConsumerGroupTopicPartitions(group, partitions)]
        found = self._admin.list_consumer_group_offsets(asked)[group].result().topic_partitions
        return sum(max(0, partition.offset) for partition in found)


@contextmanager
def broker(folder: Path, *, mock: bool) -> Iterator[str]:
    """Run a broker; yield its address."""
    if mock:
        cluster = Cluster()
        yield cluster.brokers
        cluster.close()
        return
    with KafkaServer(folder / "kafka") as kafka:
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
        names = [*TOPICS, "tcp_flow", "tcp_alerts"]
        for made in admin.create_topics([NewTopic(PREFIX + name, PARTITIONS, 1) for name in names]).values():
            made.result()
        yield kafka.bootstrap


def _cpu_s(process: "subprocess.Popen[bytes]", log: Path) -> float:
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1, 65), log.read_text()
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=45)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--engine", action="store_true", help="only decode and evaluate, in this process")
    parser.add_argument("--mock", action="store_true")
    parser.add_argument("--tree", type=Path, action="append", default=[])
    options = parser.parse_args()
    if options.engine:
        taken_us = sorted(engine_us(10) for _ in range(options.repeat))
        rate = 1e6 / statistics.median(taken_us)
        print(f"us of CPU per flow record: {' '.join(f'{us:.2f}' for us in taken_us)}, {rate:,.0f} records/s")
        return
    trees = [ROOT, *(tree.resolve() for tree in options.tree)]
    taken: dict[tuple[str, Path], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, broker(Path(name), mock=options.mock) as bootstrap:
        reading = Reading(Path(name), bootstrap, options.rounds)
        for _ in range(options.repeat):
            for tree in trees:
                taken["verify", tree].append(reading.verify_us(tree))
                if not options.mock:
                    taken["alert", tree].append(reading.alert_us(tree))
    print(f"{reading.flows} flow records, {reading.events} events, us of CPU each:")
    for (reader, tree), each_us in taken.items():
        rounds = " ".join(f"{us:.2f}" for us in each_us)
        print(f"{reader:<7} median={statistics.median(each_us):.2f} rounds={rounds} tree={tree.name}")


if __name__ == "__main__":
    main()
