"""Simulated hosts in one process. Each has the producer's own sink, and sends what a quiet host sends.

python -m tests.bench.hosts BROKERS PREFIX FIRST COUNT SPREAD_S LATENCY_S SLOWER SETTINGS. Prints "ready", starts the
hosts at the first line on standard input, each at a random time within SPREAD_S, and answers each further line with a
Report in JSON. A host sends SLOWER times less often than a quiet one. At the end of its input it ends like a process
that is killed: its sockets close, and no client says goodbye.

Not simulated: the spool. While messages of a stream are in flight, the host sends no others of it.
"""

import json
import logging
import os
import random
import select
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from producer.config.load import Config
from producer.encode.batch import BatchEncoder
from producer.events import (
    FLOWS,
    HEARTBEATS,
    RETRANSMITS,
    STREAMS,
    TCP_FIELDS,
    TRANSMITS,
    Batch,
    EncodedBatch,
    Feed,
    SchemaId,
)
from producer.health import metrics
from producer.host.cgroups import CgroupPaths
from producer.kafka.sink import KafkaSink, producer_settings
from producer.schemas import load_schema
from producer.topics import topic
from tests.bench.stages import HOST, UTC_OFFSET_NS, rows

POLL_S = 0.2
_STARTED_AT_ONCE = 20
"""Hosts that start between two polls of all."""


@dataclass(frozen=True, slots=True)
class Send:
    """A batch that a host sends regularly."""

    feed: Feed
    every_s: float
    records: int
    first_s: float
    """Seconds from the host's start to the first one."""


def quiet(latency_s: float, slower: float) -> list[Send]:
    """Return what `python -m tests.bench.one_host --workload quiet` counts, `slower` times less often."""
    return [
        Send(TRANSMITS, slower * latency_s, int(200 * latency_s), 0),
        Send(RETRANSMITS, slower * 1.3, 1, 0.5),
        Send(FLOWS, slower * 30, 20, 3),
        Send(HEARTBEATS, slower * 10, 1, 0),
    ]


_CONNECTIONS, _VARYING = 8, 1
"""Connections, and how many of TCP_FIELDS vary by event: compressed, an event takes 23 bytes, as of a quiet host."""
_CRITERION = TRANSMITS.name
"""The stream whose deliveries show that a host delivers: it has the most."""


@dataclass(slots=True)
class Report:
    """What has happened since the last report. Times are of the monotonic clock, which all processes share."""

    first_s: list[float]
    """When each host delivered first."""
    gaps_s: list[float]
    """The longest time of each host without a delivery."""
    opened_s: list[float]
    """When each socket was opened."""
    errors: dict[str, float]
    """Errors of clients and messages since the start, by name."""
    delivered: int
    held: int
    """Batches not sent because the one before was in flight."""
    cpu_s: float
    """CPU time since the start."""
    resident_mb: float
    threads: int


class Host:
    """One simulated host. `on_socket` is called when it opens a socket."""

    def __init__(
        self,
        config: Config,
        sends: list[Send],
        batches: list[EncodedBatch],
        now_s: float,
        on_socket: Callable[[int], None],
    ) -> None:
        topics = {stream.name: topic(config, stream) for stream in STREAMS}
        topics[HEARTBEATS.name] = topic(config, HEARTBEATS)
        settings = producer_settings(config.kafka.brokers, config.kafka.settings)
        self._sink = KafkaSink(settings, topics, on_socket=on_socket)
        self._sink.open()
        self._sends, self._batches = sends, batches
        self._due_s = [now_s + send.first_s for send in sends]
        self._last_s = now_s
        self.first_s: float | None = None
        self.gap_s = 0.0
        self.delivered = self.held = 0

    def step(self, now_s: float) -> None:
        """Take delivery reports, and send what is due."""
        for stream, outcome in self._sink.poll().items():
            self.delivered += outcome.delivered
            if stream == _CRITERION and outcome.delivered:
                self.gap_s = max(self.gap_s, now_s - self._last_s)
                self._last_s = now_s
                self.first_s = self.first_s or now_s
        for index, send in enumerate(self._sends):
            if now_s >= self._due_s[index]:
                self._due_s[index] += send.every_s
                if self._sink.in_flight[send.feed.name]:
                    self.held += 1
                else:
                    self._sink.send(self._batches[index])

    def take_gap(self, now_s: float) -> float:
        """Return the longest time without a delivery since the last call, or until now if it lasts."""
        gap_s, self.gap_s = max(self.gap_s, now_s - self._last_s), 0.0
        return gap_s


class Hosts:
    """The hosts of this process."""

    def __init__(self, config: Config, names: list[str], spread_s: float, slower: float) -> None:
        self._config = config
        self._sends = quiet(config.capture.latency_s, slower)
        self._payload = _payload(max(send.records for send in self._sends))
        self._opened_s: list[float] = []
        starts_s = sorted(random.uniform(0, spread_s) for _ in names)
        self._waiting = deque(zip(starts_s, names, strict=True))
        self._began_s = float("inf")
        self._hosts: list[Host] = []

    def begin(self) -> None:
        """Let the time run."""
        self._began_s = time.monotonic()

    def _on_socket(self, _: int) -> None:
        self._opened_s.append(time.monotonic())

    def turn(self) -> None:
        """Start some of the hosts that are due, and let all others take a step."""
        for _ in range(_STARTED_AT_ONCE):
            now_s = time.monotonic()
            if not self._waiting or self._waiting[0][0] > now_s - self._began_s:
                break
            _, name = self._waiting.popleft()
            batches = [_keyed(self._payload, send, name.encode()) for send in self._sends]
            self._hosts.append(Host(self._config, self._sends, batches, now_s, self._on_socket))
        for host in self._hosts:
            host.step(time.monotonic())

    @property
    def are_starting(self) -> bool:
        """Whether hosts are due that have not started."""
        return bool(self._waiting) and self._waiting[0][0] <= time.monotonic() - self._began_s

    def report(self) -> Report:
        """Return what has happened since the last report."""
        now_s = time.monotonic()
        opened_s, self._opened_s = self._opened_s, []
        status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
        return Report(
            [host.first_s for host in self._hosts if host.first_s],
            [host.take_gap(now_s) for host in self._hosts],
            opened_s,
            {sample.labels["error"]: sample.value for sample in _errors() if sample.name.endswith("_total")},
            sum(host.delivered for host in self._hosts),
            sum(host.held for host in self._hosts),
            time.process_time(),
            int(status["VmRSS"].split()[0]) / 1024,
            int(status["Threads"]),
        )


def host_name(number: int) -> str:
    """Return the name of a simulated host."""
    return f"host-{number:05}.example"


def _errors() -> list:
    return [sample for metric in metrics._KAFKA_ERRORS.collect() for sample in metric.samples]


def _payload(count: int) -> EncodedBatch:
    """Return encoded transmits, which stand for the messages of all topics and compress like those of a real host."""
    made = rows()[:count]
    segment = made["s"]
    segment["flow"] = segment["flow"][np.arange(count) % _CONNECTIONS]
    segment["ack_seq"], segment["end_seq"] = segment["ack_seq"][0], segment["seq"]
    for name in TCP_FIELDS[_VARYING:]:
        segment[name] = segment[name][0]
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, CgroupPaths(None), "host")
    return encoder.encode(Batch(TRANSMITS, made), UTC_OFFSET_NS)


def _keyed(payload: EncodedBatch, send: Send, key: bytes) -> EncodedBatch:
    """Return the first messages of `payload` for a host, whose name is their key."""
    starts, lengths = payload.starts[: send.records], payload.lengths[: send.records]
    keys = np.frombuffer(key, np.uint8), np.zeros(send.records, np.int64), np.full(send.records, len(key), np.int64)
    return EncodedBatch(send.feed, payload.payload, starts, lengths, *keys)


def await_line() -> None:
    """Take a line from standard input, and no byte more, since `select` sees only what is not read yet.

    At the end of the input, leave the process.
    """
    while (byte := os.read(sys.stdin.fileno(), 1)) != b"\n":
        if not byte:
            os._exit(0)


def main(
    brokers: str, prefix: str, first: int, count: int, spread_s: float, latency_s: float, slower: float, settings: str
) -> None:
    """Serve until standard input ends."""
    logging.disable(logging.CRITICAL)
    config = Config().with_values(
        kafka__brokers=brokers,
        kafka__topic_prefix=prefix,
        kafka__settings=json.loads(settings),
        capture__latency_s=latency_s,
    )
    hosts = Hosts(config, [host_name(number) for number in range(first, first + count)], spread_s, slower)
    print("ready", flush=True)
    await_line()
    hosts.begin()
    while True:
        began_s = time.monotonic()
        hosts.turn()
        wait_s = 0.0 if hosts.are_starting else max(0.0, began_s + POLL_S - time.monotonic())
        if select.select([sys.stdin], [], [], wait_s)[0]:
            await_line()
            print(json.dumps(asdict(hosts.report())), flush=True)


if __name__ == "__main__":
    _, brokers, prefix, first, count, spread_s, latency_s, slower, settings = sys.argv
    main(brokers, prefix, int(first), int(count), float(spread_s), float(latency_s), float(slower), settings)
