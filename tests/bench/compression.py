"""Bytes per event on the broker, and CPU per event, by codec, level and size of batches: for `kafka.settings`.

python -m tests.bench.compression [--events 60000] [--rounds 3] [--codec lz4 --codec zstd:1 ...]

Regular traffic is what `rebpf run` captured of the traffic of tests.bench.agent: eight long connections on this host
(needs root). Random traffic has 500 flows and random numbers in all fields of TCP. Each is sent to a real Kafka through
the producer's sink, batch by batch, each of which becomes one request.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from producer.config.librdkafka import client_settings
from producer.encode.batch import BatchEncoder
from producer.events import TRANSMITS, Batch, EncodedBatch, SchemaId, Topic
from producer.host.cgroups import CgroupPaths
from producer.kafka.sink import KafkaSink
from producer.schemas import load_schema
from tests.bench.stages import HOST, UTC_OFFSET_NS, messages, rows
from tests.support.rebpf import Run
from tests.support.servers.consume import kcat_messages
from tests.support.servers.kafka import KafkaServer

PORT = 9010
CODECS = ("none", "lz4", "zstd:1", "zstd:3", "zstd:6")
SIZES = (100, 1000, 6000)
LINGER = {"linger.ms": "5"}
"""So that a batch is not split because its first messages are sent while the others are queued."""


def regular(kafka: KafkaServer, folder: Path, count: int) -> list[bytes]:
    """Return the messages of captured traffic."""
    topic = f"regular.{TRANSMITS.topic}"
    for each in (topic, "regular.tcp_retransmit", "regular.rebpf_agent"):
        kafka.create_topic(each, 1)
    config = 'kafka.topic_prefix = "regular."\n'
    with Run(folder / "run", "--brokers", kafka.bootstrap, "--port", PORT, config=config) as run:
        run.ready()
        seconds = str(count / 50_000 + 1)
        traffic = [sys.executable, str(Path(__file__).parent / "traffic.py"), "35000", seconds, str(PORT)]
        with subprocess.Popen(traffic, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as sending:
            sending.wait()
        run.finish()
    return [message.value or b"" for message in kcat_messages(kafka.bootstrap, topic)][:count]


def random(count: int) -> list[bytes]:
    """Return the messages of random traffic."""
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, CgroupPaths(None), "host")
    made: list[bytes] = []
    for seed in itertools.count():
        if len(made) >= count:
            return made[:count]
        made += messages(encoder.encode(Batch(TRANSMITS, rows(seed)), UTC_OFFSET_NS))
    raise AssertionError


def batches(values: Sequence[bytes], size: int) -> Iterator[EncodedBatch]:
    """Yield the messages in batches of `size`, all with the same key."""
    key = np.frombuffer(HOST["host"].encode(), np.uint8)
    for at in range(0, len(values) - size + 1, size):
        part = values[at : at + size]
        lengths = np.array([len(value) for value in part], np.int64)
        starts, zeros = np.cumsum(lengths) - lengths, np.zeros(size, np.int64)
        yield EncodedBatch(
            TRANSMITS, np.frombuffer(b"".join(part), np.uint8), starts, lengths, key, zeros, zeros + len(key)
        )


def settings_of(codec: str) -> dict[str, str]:
    """Return the settings of CODEC or CODEC:LEVEL."""
    name, _, level = codec.partition(":")
    return {"compression.codec": name, **({"compression.level": level} if level else {})}


def send(kafka: KafkaServer, topic: str, settings: Mapping[str, str], made: Sequence[EncodedBatch]) -> float:
    """Send batches one after the other; return microseconds of CPU per event, of all threads."""
    sink = KafkaSink(client_settings(kafka.bootstrap, {**settings, **LINGER}), {TRANSMITS.name: Topic(topic)})
    sink.open()
    for number, batch in enumerate(made):
        if number == 1:  # the first one waits for the connection
            before = time.process_time()
        sink.send(batch)
        while sink.in_flight.total():
            sink.poll()
            time.sleep(0.0005)
    cost = time.process_time() - before
    sink.close()
    return cost / sum(map(len, made[1:])) * 1e6


def main() -> None:
    """Measure and print; of the rounds' costs the lowest, since other work on the machine only adds to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", action="append", metavar="CODEC[:LEVEL]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, KafkaServer(Path(name) / "kafka", num_partitions=1) as kafka:
        for traffic, values in (
            ("regular", regular(kafka, Path(name), given.events)),
            ("random", random(given.events)),
        ):
            print(f"{traffic}: {len(values)} events of {sum(map(len, values)) / len(values):.0f} bytes", flush=True)
            for codec, size in itertools.product(given.codec or CODECS, SIZES):
                made = list(batches(values, size))
                costs, stored = [], 0
                for number in range(given.rounds):
                    topic = f"{traffic}.{codec.replace(':', '.')}.{size}.{number}"
                    kafka.create_topic(topic, 1)
                    costs.append(send(kafka, topic, settings_of(codec), made))
                    stored = sum(file.stat().st_size for file in (kafka.folder / "data").glob(f"{topic}-*/*.log"))
                print(
                    f"{traffic} {codec} batches of {size}: {stored / sum(map(len, made)):.1f} bytes per event, "
                    f"{min(costs):.2f} us of CPU an event",
                    flush=True,
                )


if __name__ == "__main__":
    main()
