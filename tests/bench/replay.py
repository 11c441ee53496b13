"""CPU of the producer per record of short connections, without the kernel: rows are written to rings at a rate.

python -m tests.bench.replay [--rate 4000] [--seconds 10] [--rounds 3] [--tree NAME=FOLDER ...]

In a process of its own are the readers of the rings, encoders, metrics and sink of `rebpf run`; the broker is
librdkafka's mock, in this process. Prints the CPU of all threads, less that of a run without rows: the least of all
rounds, since other programs only ever add to it. `--tree` adds the producer of another checkout. Needs no root.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from producer.backoff import BackOff
from producer.config.librdkafka import client_settings
from producer.encode.batch import BatchEncoder
from producer.encode.isolate import Isolator
from producer.events import FLOWS, KNOWN, REASONS, STATES, STREAMS, TRANSMITS, Rows, Stream, common
from producer.health.tcp import TcpMetrics
from producer.host.cgroups import CgroupPaths
from producer.host.clock import UtcOffset
from producer.kafka.sink import KafkaSink
from producer.kernel.ringbuf import Ring
from producer.pipeline.ledger import Account, Ledger
from producer.pipeline.pipeline import Pipeline
from producer.pipeline.stream import Stores, StreamPipeline
from producer.schemas import load_schema
from tests.support.documents import ROOT
from tests.support.mock_cluster import Cluster

HOST = {"host": "host-0001.example", "boot_id": "5e4a1cde-0000-4000-8000-123456789abc", "labels": {}}
RING_BYTES = 1 << 27
"""Enough that nothing wraps: memory is not mapped twice as the kernel's is."""
SEGMENTS = 5
"""Of each end of a connection."""
TICK_S, SETTLE_S = 0.01, 1.5


def rows(stream: Stream, first: int, count: int, random: np.random.Generator) -> Rows:
    """Return rows of connections on loopback with a request and a response; each row of the flow stream ends one."""
    made = np.zeros(count, stream.dtype)
    number = np.arange(first, first + count)
    end = number if stream == FLOWS else number // SEGMENTS
    segment = common(made)
    for name, value in (("ts", time.monotonic_ns()), ("cpu_seq", number), ("cpu", number % 2)):
        segment[name] = value
    segment["sample_rate"] = segment["rules_version"] = 1
    flow = segment["flow"]
    for side in ("saddr", "daddr"):
        flow[side][:, 10:] = [255, 255, 127, 0, 0, 1]
    flow["sport"], flow["dport"] = np.where(end % 2, 443, end // 2 % 60_000 + 1024), np.where(end % 2, 1024, 443)
    flow["sk_cookie"], flow["cgroup_id"], flow["netns"] = end + 1, 1, 4026531840
    flow["hook"], flow["flow_known"] = 2, 7
    segment["known"] = KNOWN["tcp"] | KNOWN["counters"] | KNOWN["start_ns"] | KNOWN["role"] | KNOWN["process"] | 7
    for name in ("srtt_us", "mdev_us"):
        segment[name] = random.integers(20, 300, count)
    segment["rto_us"], segment["snd_cwnd"], segment["mss"], segment["snd_wnd"] = 204_000, 10, 32_768, 65_536
    segment["pid"], segment["comm"][:, :5] = 4711, list(b"nginx")
    if stream == FLOWS:
        made["start_ns"], made["reason"] = segment["ts"] - 1_000_000, REASONS.index("close")
        made["role"], made["state"] = 1 + end % 2, STATES.index("FIN_WAIT2")
        made["segs_out"], made["segs_in"], made["bytes_sent"], made["bytes_received"] = SEGMENTS, SEGMENTS, 100, 100
        for name in ("pacing_rate", "delivery_rate"):
            made[name] = random.integers(1 << 28, 1 << 34, count)
    else:
        segment["seq"], segment["ack_seq"] = random.integers(0, 1 << 32, (2, count))
        segment["end_seq"], segment["segs"], segment["state"] = segment["seq"] + 100, 1, STATES.index("ESTABLISHED")
    return made


class WritableRing:
    """A ring's memory, which the producer inherits, and the kernel's part of it."""

    def __init__(self, stream: Stream) -> None:
        self.descriptor = os.memfd_create(stream.name)
        self._stream, self._written = stream, 0
        os.ftruncate(self.descriptor, 2 * mmap.PAGESIZE + 2 * RING_BYTES)
        memory = mmap.mmap(self.descriptor, 0)
        self._position = np.frombuffer(memory, "<u8", 1, mmap.PAGESIZE)
        record = np.dtype([("length", "<u4"), ("page", "<u4"), ("row", stream.dtype)])
        self._records = np.frombuffer(memory, record, RING_BYTES // record.itemsize, 2 * mmap.PAGESIZE)

    def write_until(self, written: int, random: np.random.Generator) -> None:
        """Write rows until this many are written."""
        records = self._records[self._written : written]
        records["row"] = rows(self._stream, self._written, len(records), random)
        records["length"] = self._stream.dtype.itemsize
        self._written = written
        self._position[0] = written * self._records.itemsize


def produce(stream_name: str, descriptor: int, brokers: str, seconds: float) -> None:
    """Be the producer: print a line when ready, and then the CPU used and the records delivered."""
    stream = next(each for each in STREAMS if each.name == stream_name)
    sink = KafkaSink(client_settings(brokers, {}), {stream.name: stream.topic})
    sink.open()
    encoder = BatchEncoder(
        stream, load_schema(stream.schema_file), stream.fixed_schema_id, HOST, CgroupPaths(None), "host"
    )
    with tempfile.TemporaryDirectory() as name, Ring(descriptor, RING_BYTES, stream.dtype) as ring:
        ledger = Ledger(Path(name) / "ledger")
        ledger.open()
        stores = Stores(None, ledger.write, BackOff("spool"), 10)
        isolator = Isolator(encoder, lambda rows, error: None)
        one = StreamPipeline(stream, ring, isolator, stores, Account(), TcpMetrics().counter(stream))
        pipeline = Pipeline([one], sink, time.monotonic, UtcOffset())
        print("ready", flush=True)
        end = time.monotonic() + seconds
        before_s = time.process_time()
        while (left_s := end - time.monotonic()) > 0:
            time.sleep(max(0, min(pipeline.turn(), left_s)))
        print(json.dumps([time.process_time() - before_s, one.account.delivered]), flush=True)
        ledger.close()
    sink.close()


def measure(tree: Path, stream: Stream, rate: float, seconds: float) -> float:
    """Return the CPU in seconds of a producer beside this rate of rows."""
    ring, cluster, random = WritableRing(stream), Cluster(), np.random.default_rng(1)
    cluster.create(stream.topic)
    run = [stream.name, str(ring.descriptor), cluster.brokers, str(seconds + SETTLE_S)]
    with subprocess.Popen(
        [sys.executable, __file__, "--produce", *run],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tree)},
        pass_fds=[ring.descriptor],
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        for elapsed_s in ticks(seconds):
            ring.write_until(int(elapsed_s * rate), random)
        used_s, delivered = json.loads(process.stdout.readline())
    os.close(ring.descriptor)
    assert delivered == int(seconds * rate), delivered
    return float(used_s)


def ticks(seconds: float) -> Iterator[float]:
    """Yield the seconds since the first call every TICK_S, and the last time exactly `seconds`."""
    start = time.monotonic()
    while (elapsed_s := time.monotonic() - start) < seconds:
        yield elapsed_s
        time.sleep(TICK_S)
    yield seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=4000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tree", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--produce", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.produce:
        stream_name, descriptor, brokers, seconds = options.produce
        produce(stream_name, int(descriptor), brokers, float(seconds))
        return
    trees = {"this": ROOT, **{name: Path(folder) for name, _, folder in (each.partition("=") for each in options.tree)}}
    cases = [(stream, rate) for stream in (FLOWS, TRANSMITS) for rate in (0.0, options.rate)]
    used_s: dict[tuple[str, str, float], float] = {}
    for _ in range(options.rounds):
        for name, tree in trees.items():
            for stream, rate in cases:
                case = name, stream.name, rate
                used_s[case] = min(used_s.get(case, 1e9), measure(tree, stream, rate, options.seconds))
    for name in trees:
        for stream in (FLOWS, TRANSMITS):
            idle_s, busy_s = (used_s[name, stream.name, rate] for rate in (0.0, options.rate))
            us = (busy_s - idle_s) / (options.rate * options.seconds) * 1e6
            print(f"{name}: {stream.name} {us:.2f} us a record, idle {idle_s / options.seconds:.2%} of a core")


if __name__ == "__main__":
    main()
