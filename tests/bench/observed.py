"""What brokers have served and used between two looks at them."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.bench.contender import cpu_s, memory_mb
from tests.bench.jmx import Jmx
from tests.bench.one_host import OF_BROKERS, connections, port_of
from tests.support.servers.kafka import KafkaServer


@dataclass(frozen=True, slots=True)
class Look:
    """The counters of a broker's process since it started."""

    pid: int
    cpu_s: float
    cpu_at_s: float
    requests: Counter[str]
    requests_at_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a broker has done between two looks. Of one that was restarted in between, since then, but no CPU time."""

    seconds: float
    cpu_s: float
    cores: float
    requests: Counter[str]
    """Requests of clients by kind."""
    requests_per_s: Mapping[str, float]


class Observed:
    """Running brokers. A look takes about a second of their CPU, which does not count."""

    def __init__(self, brokers: Sequence[KafkaServer]) -> None:
        self._brokers = brokers
        self._jmx: dict[int, Jmx] = {}
        self._before: list[Look] = []

    def begin(self) -> None:
        """Begin to count anew."""
        requests = self._requests()
        self._before = self._looks(requests, time.monotonic())

    def work(self) -> list[Work]:
        """Return the work of each broker since `begin`."""
        now = self._looks([Counter() for _ in self._brokers], 0)
        requests, at_s = self._requests(), time.monotonic()
        return [
            _work(before, Look(look.pid, look.cpu_s, look.cpu_at_s, counts, at_s))
            for before, look, counts in zip(self._before, now, requests, strict=True)
        ]

    def connections(self) -> list[int]:
        """Return the connections of hosts to each broker."""
        return [connections(port_of(broker.bootstrap)) for broker in self._brokers]

    def memory_mb(self) -> list[float]:
        """Return the resident memory of each broker."""
        return [memory_mb(broker.pid, "VmRSS") for broker in self._brokers]

    def _looks(self, requests: Sequence[Counter[str]], at_s: float) -> list[Look]:
        return [
            Look(broker.pid, cpu_s(broker.pid), time.monotonic(), counts, at_s)
            for broker, counts in zip(self._brokers, requests, strict=True)
        ]

    def _requests(self) -> list[Counter[str]]:
        with ThreadPoolExecutor() as readers:
            return list(readers.map(self._requests_of, self._brokers))

    def _requests_of(self, broker: KafkaServer) -> Counter[str]:
        if broker.pid not in self._jmx:
            self._jmx[broker.pid] = Jmx(broker.pid)
        return self._jmx[broker.pid].requests()


def _work(before: Look, now: Look) -> Work:
    is_same = before.pid == now.pid
    used_s = now.cpu_s - before.cpu_s if is_same else 0.0  # otherwise mostly the start of its JVM
    counts = now.requests - before.requests if is_same else now.requests
    requests = Counter({kind: count for kind, count in counts.items() if kind not in OF_BROKERS})
    seconds = now.requests_at_s - before.requests_at_s
    rates = {kind: count / seconds for kind, count in requests.items()}
    return Work(seconds, used_s, used_s / (now.cpu_at_s - before.cpu_at_s), requests, rates)
