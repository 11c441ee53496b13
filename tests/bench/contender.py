"""One run of one agent beside a workload, measured from outside."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.broker import Broker
from tests.bench.workloads import Traffic, Workload

SETTLE_S = 1.5
"""Time after the traffic in which an agent delivers what it still holds; its CPU counts."""


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of one run.

    `cpu_s`: of all threads, from the start of the traffic until it has settled. `start_cpu_s`: until the agent was
    ready, its children included.
    """

    seconds: float
    start_s: float
    start_cpu_s: float
    cpu_s: float
    anon_mb: float
    rss_mb: float
    segments: int
    delivered: int
    lost: int
    requests: int
    stored_bytes: int
    ages_ms: dict[str, Sequence[float]]

    @property
    def us_per_event(self) -> float:
        """CPU time per delivered event; not a number on an idle host."""
        return self.cpu_s / self.delivered * 1e6 if self.delivered >= self.seconds else float("nan")


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process with all its threads, from its CPU clock (CPUCLOCK_SCHED)."""
    return time.clock_gettime(~pid << 3 | 2)


def start_cpu_s(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, name: str) -> float:
    """Return VmRSS or RssAnon of a process; the latter has no pages of files and rings."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) / 1024


def start(command: Sequence[str]) -> tuple["subprocess.Popen[str]", float]:
    """Start an agent. Return it when it is ready, and how long that took."""
    began = time.monotonic()
    command = ["setpriv", "--pdeathsig", "KILL", *command]  # execs: the process is the agent
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert agent.stderr
    said = ""
    for line in agent.stderr:
        said += line
        if "ready" in line:
            return agent, time.monotonic() - began
    raise RuntimeError(f"{' '.join(command)} ended before it was ready: {said}")


def stop(agent: "subprocess.Popen[str]") -> dict[str, int]:
    """Stop an agent, and return its balance over all topics."""
    agent.send_signal(signal.SIGTERM)
    topics = json.loads(agent.communicate()[0].splitlines()[-1]).values()
    return {name: sum(each[name] for each in topics) for name in ("passed", "delivered")}


def measure(command: Sequence[str], workload: Workload, port: int, seconds: float, broker: Broker) -> Result:
    """Run an agent beside the workload."""
    with Traffic(workload, port, seconds) as traffic:
        agent, start_s = start(command)
        started_cpu_s = start_cpu_s(agent.pid)
        time.sleep(SETTLE_S)
        broker.ages_ms()
        before = cpu_s(agent.pid)
        segments = traffic.run()
        time.sleep(SETTLE_S)
        used_s, ages_ms = cpu_s(agent.pid) - before, broker.ages_ms()
        anon_mb, rss_mb = memory_mb(agent.pid, "RssAnon"), memory_mb(agent.pid, "VmRSS")
        balance = stop(agent)
    requests, stored_bytes = broker.work()
    return Result(
        seconds,
        start_s,
        started_cpu_s,
        used_s,
        anon_mb,
        rss_mb,
        segments,
        balance["delivered"],
        balance["passed"] - balance["delivered"],
        requests,
        stored_bytes,
        ages_ms,
    )
