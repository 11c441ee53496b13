"""The cost of one member of `rebpf alert`: events per second while catching up, and CPU per event.

python -m tests.bench.alert [--rounds 45]

Synthetic events of 20 hosts and 500 flows, in six partitions of each topic of a real Kafka, with a rule by host (ratio)
and one by peer (count). The member is a separate process; CPU is its total without the start.
"""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from producer.encode.batch import BatchEncoder
from producer.events import RETRANSMITS, TRANSMITS, Batch, SchemaId, Stream
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from tests.bench.stages import ROWS, messages, rows
from tests.support.rebpf import command, rebpf, wait_until
from tests.support.servers.kafka import KafkaServer

HOSTS, PARTITIONS = 20, 6
ROUND = ROWS + ROWS // 10
"""Transmits of one host, and a tenth of them again as retransmits."""
TOPICS = ("tcp_transmit", "tcp_retransmit")
CONFIG = """
kafka.brokers = "{brokers}"
kafka.topic_prefix = "{prefix}"
alert.group = "{prefix}alert"
[[alert.rules]]
name = "loss"
by = "host"
measure = "ratio"
window_s = 10
[[alert.rules]]
name = "peer"
by = "peer"
measure = "count"
window_s = 10
threshold = 1000000
clear = 1000
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


def retransmits(transmits: np.ndarray) -> np.ndarray:
    made = np.zeros(len(transmits), RETRANSMITS.dtype)
    made["s"] = transmits["s"]
    return made


def encoder(stream: Stream, host: int) -> BatchEncoder:
    names = {"host": f"host-{host:04}.example", "boot_id": f"5e4a1cde-0000-4000-8000-{host:012}"}
    return BatchEncoder(
        stream, load_schema(stream.schema_file), SchemaId(stream.fixed_schema_id), names, CgroupPaths(None)
    )


def read(admin: AdminClient, prefix: str) -> int:
    """Return how many events the group has processed."""
    places = [TopicPartition(prefix + topic, number) for topic in TOPICS for number in range(PARTITIONS)]
    group = f"{prefix}alert"
    asked = [ConsumerGroupTopicPartitions(group, places)]
    found = admin.list_consumer_group_offsets(asked)[group].result().topic_partitions
    return sum(max(0, place.offset) for place in found)


def measured(folder: Path, prefix: str, kafka: KafkaServer, rounds: int) -> tuple[float, float]:
    """Run a member until all events are processed; return the seconds since it was ready, and its CPU."""
    config, log = folder / f"{prefix}toml", folder / f"{prefix}log"
    config.write_text(CONFIG.format(brokers=kafka.bootstrap, prefix=prefix))
    made = rebpf("init", "--alerts", "--partitions", PARTITIONS, "--config", config)
    assert made.returncode == 0, made.stderr
    fill(kafka.bootstrap, prefix, rounds)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
    with log.open("wb") as err:
        member = subprocess.Popen(command("alert", "--config", config, "--from-beginning"), stderr=err)
    wait_until("ready", lambda: " ready " in log.read_text())
    started = time.monotonic()
    while read(admin, prefix) < rounds * ROUND:
        time.sleep(0.2)
    seconds = time.monotonic() - started
    member.terminate()
    _, status, usage = os.wait4(member.pid, 0)
    assert status == 0, log.read_text()
    print(log.read_text().splitlines()[-1])
    return seconds, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=45)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name, KafkaServer(Path(name) / "kafka") as kafka:
        _, start_s = measured(Path(name), "none.", kafka, 0)
        seconds, cpu_s = measured(Path(name), "many.", kafka, rounds)
    events = rounds * ROUND
    rate, each_us = events / seconds, (cpu_s - start_s) / events * 1e6
    print(f"{events} events in {seconds:.1f} s: {rate:.0f} a second, {each_us:.1f} us of CPU each")


if __name__ == "__main__":
    main()
