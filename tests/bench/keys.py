"""CPU per event and produce requests a second, by the key of the messages and the number of partitions.

python -m tests.bench.keys [--seconds 10] [--rounds 3] [--partitions 6 --partitions 60]

Messages of 500 flows, ready to be sent, go to a real Kafka through the producer's sink: 600 every 10 ms, and 200 a
second. librdkafka sends a request for each partition, and reports on each request.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from producer.config.librdkafka import client_settings
from producer.encode.batch import BatchEncoder, Key
from producer.events import TRANSMITS, Batch, EncodedBatch, SchemaId, Topic
from producer.host.cgroups import CgroupPaths
from producer.kafka.connection import Connection
from producer.kafka.sink import KafkaSink
from producer.schemas import load_schema
from tests.bench.stages import HOST, UTC_OFFSET_NS, rows
from tests.support.servers.kafka import KafkaServer

KEYS: tuple[Key, ...] = ("flow", "host")
LOADS = ((600, 0.01), (20, 0.1))
"""Events in a batch, and seconds between batches."""


class CountingConnection(Connection):
    """Counts the events with delivery reports, each of which is of one request."""

    requests = 0

    def reports(self) -> Iterator[tuple[object, bool]]:  # type: ignore[override]
        for each in super().reports():
            self.requests += 1
            yield each


def send(
    kafka: KafkaServer, topic: str, batches: "itertools.cycle[EncodedBatch]", wait_s: float, seconds: float
) -> tuple[float, float]:
    """Return microseconds of CPU per event, of all threads, and requests a second."""
    sink = KafkaSink(client_settings(kafka.bootstrap, {}), {TRANSMITS.name: Topic(topic)})
    sink._connection.__class__ = CountingConnection
    sink.open()

    def drain() -> None:
        while sink.in_flight.total():
            sink.poll()
            time.sleep(0.002)

    sink.send(next(batches))  # waits for the connection
    drain()
    sink._connection.requests = 0  # type: ignore[attr-defined]
    sent, start, before = 0, time.monotonic(), time.process_time()
    while time.monotonic() < start + seconds:
        batch = next(batches)
        sink.send(batch)
        sent += len(batch)
        time.sleep(wait_s)
        sink.poll()
    drain()
    cost = (time.process_time() - before) / sent * 1e6
    requests = sink._connection.requests / seconds  # type: ignore[attr-defined]
    sink.close()
    return cost, requests


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--partitions", type=int, action="append")
    given = parser.parse_args()
    schema = load_schema(TRANSMITS.schema_file)
    with tempfile.TemporaryDirectory() as folder, KafkaServer(Path(folder) / "kafka") as kafka:
        for (size, wait_s), partitions in itertools.product(LOADS, given.partitions or (6, 60)):
            found: dict[Key, list[tuple[float, float]]] = {key: [] for key in KEYS}
            for number, key in itertools.product(range(given.rounds), KEYS):
                encoder = BatchEncoder(TRANSMITS, schema, SchemaId(1), HOST, CgroupPaths(None), key)
                made = [encoder.encode(Batch(TRANSMITS, rows(seed)[:size]), UTC_OFFSET_NS) for seed in range(16)]
                topic = f"{key}.{size}.{partitions}.{number}"
                kafka.create_topic(topic, partitions)
                found[key].append(send(kafka, topic, itertools.cycle(made), wait_s, given.seconds))
            for key, results in found.items():
                cost, requests = (statistics.median(column) for column in zip(*results, strict=True))
                print(
                    f"{size} events every {wait_s} s, {partitions} partitions, key {key}: "
                    f"{cost:.2f} us of CPU an event, {requests:.0f} requests/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
