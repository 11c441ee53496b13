"""A fleet of simulated hosts in some processes (tests/bench/hosts.py), as seen from one."""

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from producer.paths import IMPORTED_FROM
from tests.bench.hosts import Report

HOSTS_IN_PROCESS = 500
"""librdkafka needs some ten file descriptors and five threads for each."""
DEADLINE_S = 600.0


class Fleet:
    """`count` hosts that start at `go`, each at a random time within `spread_s`.

    They send `slower` times less often than quiet hosts. `prefix` is that of their topics, and `settings` are
    librdkafka's.
    """

    def __init__(
        self,
        brokers: str,
        count: int,
        spread_s: float = 0,
        latency_s: float = 1,
        slower: float = 1,
        prefix: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.count = count
        self.opened_s: list[float] = []
        """When each socket was opened since `mark`, until the last report."""
        self.gaps_s: list[float] = []
        """The longest time of each host without a delivery since `mark`, until the last report."""
        self.errors: Counter[str] = Counter()
        """Errors of clients and messages since `mark`, until the last report, by name."""
        self._errors_before: Counter[str] = Counter()
        self._marked_s = self._went_s = 0.0
        self._ready = 0
        given = json.dumps(settings or {})
        share = max(1, min(HOSTS_IN_PROCESS, -(-count // 2)))
        self._processes = [
            _process(brokers, prefix, first, min(share, count - first), spread_s, latency_s, slower, given)
            for first in range(0, count, share)
        ]

    def wait_until_ready(self) -> None:
        """Wait until all processes are ready."""
        for process in self._processes[self._ready :]:
            process.stdout.readline()
            self._ready += 1

    def go(self) -> None:
        """Start the hosts, once their processes are ready."""
        self.wait_until_ready()
        self._marked_s = self._went_s = time.monotonic()
        self._tell("go")

    def mark(self) -> None:
        """Begin to count anew."""
        self._errors_before = Counter(self.report().errors)
        self._marked_s = time.monotonic()
        self.opened_s, self.gaps_s = [], []

    def report(self) -> Report:
        """Return the report of all hosts."""
        self._tell("report")
        parts = [Report(**json.loads(process.stdout.readline())) for process in self._processes]
        whole = Report([], [], [], Counter(), 0, 0, 0, 0, 0)
        for part in parts:
            whole.first_s += [each - self._went_s for each in part.first_s]
            whole.gaps_s += part.gaps_s
            whole.opened_s += part.opened_s
            whole.errors += Counter(part.errors)
            for name in ("delivered", "held", "cpu_s", "resident_mb", "threads"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        self.opened_s += whole.opened_s
        self.errors = Counter(whole.errors) - self._errors_before
        self.gaps_s = list(itertools.starmap(max, itertools.zip_longest(self.gaps_s, whole.gaps_s, fillvalue=0.0)))
        return whole

    def wait_until(self, is_true: Callable[[Report], bool]) -> Report:
        """Wait until a report is as wanted, or for ten minutes, and return it."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not is_true(report := self.report()) and time.monotonic() < deadline_s:
            time.sleep(0.5)
        return report

    def deliver_first(self) -> Report:
        """Wait until each host has delivered, and return the report."""
        return self.wait_until(lambda report: len(report.first_s) == self.count)

    def most_opened_per_s(self) -> int:
        """Return the most sockets opened in one second."""
        return max(Counter(int(at_s - self._marked_s) for at_s in self.opened_s).values(), default=0)

    def kill(self) -> None:
        """End all hosts at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()

    def _tell(self, line: str) -> None:
        for process in self._processes:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _process(*arguments: str | float) -> "subprocess.Popen[str]":
    run = [sys.executable, "-m", "tests.bench.hosts", *map(str, arguments)]
    command = ["setpriv", "--pdeathsig", "KILL", "env", f"--chdir={IMPORTED_FROM}", *run]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
