"""CPU per event of the producer's stages, compared with the baseline: encode (in C, or fastavro per record) and
produce (librdkafka's batch call, or confluent-kafka's produce()); and that of the metrics of TCP. Without the kernel:
the rows are synthetic.

python -m tests.bench.stages
"""

import io
import statistics
import time
from collections.abc import Callable

import fastavro
import numpy as np
from confluent_kafka import Producer

from producer import events
from producer.config.librdkafka import DEFAULTS, TEST_BROKER, client_settings
from producer.encode.batch import BatchEncoder
from producer.events import FLOW, TCP_FIELDS, TRANSMITS, Batch, EncodedBatch, Rows, SchemaId, Topic
from producer.health.tcp import TcpMetrics
from producer.host.cgroups import CgroupPaths
from producer.kafka.sink import KafkaSink
from producer.schemas import load_schema
from tests.bench import replay

ROWS, FLOWS = 4096, 500
SIZES = (10, 100, ROWS)
ROUNDS = 7
HOST = {"host": "host-0001.example", "boot_id": "5e4a1cde-0000-4000-8000-123456789abc"}
UTC_OFFSET_NS = 1_700_000_000_000_000_000


def rows(seed: int = 1) -> Rows:
    """Return rows of some hundred flows, with realistic values."""
    random = np.random.default_rng(seed)
    flows = np.zeros(FLOWS, FLOW)
    for side in ("saddr", "daddr"):
        flows[side][:, 10:12] = 255
        flows[side][:, 12:] = random.integers(1, 255, (FLOWS, 4))
    flows["sport"], flows["dport"] = random.integers(1024, 65535, FLOWS), 443
    flows["sk_cookie"], flows["cgroup_id"] = random.integers(1, 1 << 24, (2, FLOWS))
    flows["netns"], flows["hook"], flows["flow_known"] = 4026531840, 3, 7
    made = np.zeros(ROWS, TRANSMITS.dtype)
    segment = made["s"]
    segment["flow"] = flows[random.integers(0, FLOWS, ROWS)]
    segment["ts"], segment["cpu_seq"] = np.arange(ROWS) * 16_000 + 10**15, np.arange(ROWS) + 10**7
    for name in ("seq", "end_seq", "ack_seq"):
        segment[name] = random.integers(0, 1 << 32, ROWS)
    for name in TCP_FIELDS:
        segment[name] = random.integers(0, 1 << 16, ROWS)
    segment["known"], segment["segs"], segment["sample_rate"], segment["state"] = 0xFF, 1, 1, 1
    segment["payload_len"], segment["tcp_flags"] = random.integers(0, 1448, ROWS), 0x18
    return made


def encoder() -> BatchEncoder:
    """Return the producer's encoder of transmits."""
    return BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, CgroupPaths(None))


def messages(batch: EncodedBatch) -> list[bytes]:
    """Return an encoded batch's messages."""
    whole = batch.payload.tobytes()
    return [whole[start : start + size] for start, size in zip(batch.starts, batch.lengths, strict=True)]


def us_per_event(work: Callable[[], None], repeat: int = 20, rows: int = ROWS) -> float:
    """Return microseconds of CPU, of all threads, per row."""
    work()
    before = time.process_time()
    for _ in range(repeat):
        work()
    return (time.process_time() - before) / repeat / rows * 1e6


def encode_batches(size: int, *, new_flows: bool) -> float:
    """Return the cost of batches of `size` rows: of some hundred flows, or each row of a flow never seen before."""
    ours, made = encoder(), rows()
    for _ in range(3):
        ours.encode(Batch(TRANSMITS, made), UTC_OFFSET_NS)  # has looked up the cgroups
    if new_flows:
        made["s"]["flow"]["sport"] = np.arange(ROWS) % 50_000 + 1024
    batches = [Batch(TRANSMITS, made[first : first + size]) for first in range(0, ROWS - size + 1, size)]
    cookies = made["s"]["flow"]["sk_cookie"]

    def encode() -> None:
        if new_flows:
            np.add(cookies, 1 << 24, out=cookies)
        for batch in batches:
            ours.encode(batch, UTC_OFFSET_NS)

    return min(us_per_event(encode, 2, len(batches) * size) for _ in range(ROUNDS))


def count_batches(size: int) -> float:
    """Return the cost of counting the metrics from batches of `size` records, each of another connection."""
    made = replay.rows(events.FLOWS, 0, ROWS, np.random.default_rng(1))
    batches = [made[first : first + size] for first in range(0, ROWS - size + 1, size)]

    def count() -> None:
        take = TcpMetrics(since_ns=1).counter(events.FLOWS)
        assert take
        for batch in batches:
            take(batch)

    return min(us_per_event(count, 2, len(batches) * size) for _ in range(ROUNDS))


def produce_with(batch: EncodedBatch) -> tuple[float, float]:
    """Return the cost of the sink's batch call, and of produce() per message; both to a broker in this process."""
    sink = KafkaSink(client_settings(None, {}), {TRANSMITS.name: Topic("bench")})
    sink.open()

    def send() -> None:
        sink.send(batch)
        while sink.in_flight.total():
            sink.poll()
            time.sleep(0.002)

    ours = us_per_event(send)
    sink.close()
    producer = Producer({**DEFAULTS, **TEST_BROKER, "enable.idempotence": True, "acks": "all"})
    values = messages(batch)

    def produce() -> None:
        for value in values:
            producer.produce(
                "bench", value, key=b"10.0.0.1:443>10.0.0.2:50000", on_delivery=lambda error, message: None
            )
        producer.flush()

    return ours, us_per_event(produce)


def us_per_batch(batch: EncodedBatch, repeat: int = 200) -> float:
    """Return microseconds of the calling thread's CPU to send a batch and to process its reports, without polls for
    nothing; the median.
    """
    sink = KafkaSink(client_settings(None, {"linger.ms": "1"}), {TRANSMITS.name: Topic("bench")})
    sink.open()
    costs = []
    for _ in range(repeat):
        before = time.thread_time()
        sink.send(batch)
        cost = time.thread_time() - before
        while left := sink.in_flight.total():
            time.sleep(0.003)
            before = time.thread_time()
            sink.poll()
            if sink.in_flight.total() < left:
                cost += time.thread_time() - before
        costs.append(cost)
    sink.close()
    return statistics.median(costs) * 1e6


def main() -> None:
    """Measure and print."""
    batch = Batch(TRANSMITS, rows())
    native = encoder()
    encoded = native.encode(batch, UTC_OFFSET_NS)
    schema = fastavro.parse_schema(load_schema(TRANSMITS.schema_file))
    records = [fastavro.schemaless_reader(io.BytesIO(message[5:]), schema) for message in messages(encoded)]

    def by_record() -> None:
        for record in records:
            fastavro.schemaless_writer(io.BytesIO(), schema, record)

    print(f"{ROWS} events of {len(schema['fields'])} fields, {encoded.lengths.mean():.0f} bytes each")
    for new_flows in (False, True):
        kind = "each of a new flow" if new_flows else f"of {FLOWS} flows"
        costs = (f"{encode_batches(size, new_flows=new_flows):.2f} ({size})" for size in SIZES)
        print(f"encode, events {kind}: us an event (events in a batch): {', '.join(costs)}")
    for name, ours, obvious in (
        ("encode", us_per_event(lambda: native.encode(batch, UTC_OFFSET_NS) and None), us_per_event(by_record, 3)),
        ("produce", *produce_with(encoded)),
    ):
        print(f"{name}: {ours:.2f} us an event; baseline {obvious:.2f}, {obvious / ours:.1f} times as much")
    costs = (f"{count_batches(size):.2f} ({size})" for size in SIZES)
    print(f"count: us a record of a connection (records in a batch): {', '.join(costs)}")
    for count in (10, 100, ROWS):
        print(f"sink, a batch of {count}: {us_per_batch(encoded.take(np.arange(count))):.0f} us in the calling thread")


if __name__ == "__main__":
    main()
