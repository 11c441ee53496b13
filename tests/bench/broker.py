"""What the benchmark asks its broker: produce requests served, bytes stored, and the ages of events at a consumer."""

import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from producer.events import HEARTBEATS, STREAMS
from tests.bench.jmx import Jmx
from tests.support.servers.kafka import KafkaServer


class Broker:
    """A running Kafka with the events' topics, observed."""

    def __init__(self, kafka: KafkaServer, partitions: int) -> None:
        self._kafka = kafka
        self._requests = self._stored_bytes = 0
        for stream in (*STREAMS, HEARTBEATS):
            kafka.create_topic(stream.topic, partitions)
        self._jmx = Jmx(kafka.pid)

    def __enter__(self) -> Self:
        reader = [sys.executable, "-m", "tests.bench.reader", self._kafka.bootstrap]
        self._reader = subprocess.Popen(reader, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ages_ms()
        self.work()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.communicate()

    @property
    def bootstrap(self) -> str:
        """Address for clients."""
        return self._kafka.bootstrap

    def work(self) -> tuple[int, int]:
        """Return the produce requests served and the bytes of events stored since the last call."""
        requests, stored_bytes = self._jmx.requests("Produce")["Produce"], self._count_bytes()
        done = requests - self._requests, stored_bytes - self._stored_bytes
        self._requests, self._stored_bytes = requests, stored_bytes
        return done

    def ages_ms(self) -> dict[str, Sequence[float]]:
        """Return, by topic, the ages of events that a consumer has received since the last call."""
        assert self._reader.stdin
        assert self._reader.stdout
        self._reader.stdin.write("\n")
        self._reader.stdin.flush()
        ages: dict[str, Sequence[float]] = json.loads(self._reader.stdout.readline())
        return ages

    def _count_bytes(self) -> int:
        data = self._kafka.folder / "data"
        logs = (log for stream in STREAMS for log in data.glob(f"{stream.topic}-*/*.log"))
        return sum(log.stat().st_size for log in logs)
