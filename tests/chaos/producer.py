"""The producer of a chaos run: restarted whenever it ends, and watched from outside."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.chaos.findings import Findings
from tests.support.rebpf import command

STEP_LIMIT_S = 2.0
START_LIMIT_S = 90.0
MEMORY_EVERY_S = 5.0
DELAY_EVERY_S = 0.2
MOST_ENDS = 20
_WRONG = re.compile(r"Traceback|internal error|unaccounted for|CRITICAL| ended:")
_SLOW = re.compile(r"slow step step=(.*) seconds=([0-9.]+)")
_LEVEL = re.compile(r"^\S+ \S+ (WARNING|ERROR) (.*)")


class GaveUp(Exception):
    """The producer keeps ending by itself."""


@dataclass(slots=True)
class Life:
    """One start of the producer, and what was observed."""

    process: "subprocess.Popen[bytes]"
    began_s: float
    ready_s: float | None = None
    taken_over: bool = False
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and MB of anonymous memory."""
    end_expected: bool = False

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.began_s


class Producer:
    """`rebpf run` with these arguments. Call it from one thread only: the process dies with that thread."""

    def __init__(
        self,
        folder: Path,
        arguments: list[object],
        env: Mapping[str, str],
        findings: Findings,
        config: bytes,
        on_ready: Callable[[Life], None],
    ) -> None:
        self.folder = folder
        self.config = folder / "rebpf.toml"
        self._good_config = config
        self._command = ["setpriv", "--pdeathsig", "KILL", *command("run", "--json", "--config", self.config)]
        self._command += map(str, arguments)
        self._env = {**os.environ, **env}
        self._findings = findings
        self._on_ready = on_ready
        self._err = folder / "producer.log"
        self._err.touch()
        self._read: IO[bytes] = self._err.open("rb")
        self._rest = b""
        self.last_lines: deque[str] = deque(maxlen=30)
        self.refused = 0
        """Refused reloads; the next counts accepted ones."""
        self.reloaded = 0
        self.frozen: list[tuple[float, float]] = []
        """When SIGSTOP stopped it."""
        self._delays: deque[tuple[float, float]] = deque(maxlen=300)
        self._memory_at = self._delay_at = 0.0
        self.lives: list[Life] = []
        self.longest_step_s = 0.0
        self._ends = 0

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def pid(self) -> int:
        return self.life.process.pid

    @property
    def ready(self) -> bool:
        return self.life.ready_s is not None and self.life.process.poll() is None

    def write(self, config: bytes) -> None:
        """Write the configuration atomically."""
        fresh = self.config.with_suffix(".new")
        fresh.write_bytes(config)
        if self.config.is_dir():
            self.config.rmdir()
        fresh.replace(self.config)

    def accept(self, config: bytes) -> None:
        """Write a configuration that a start can use as well."""
        self._good_config = config
        self.write(config)

    def restore(self) -> None:
        """Write the last good configuration again."""
        self.write(self._good_config)

    def start(self) -> None:
        """Start it without waiting."""
        with self._err.open("ab") as err, (self.folder / "out").open("wb") as out:
            process = subprocess.Popen(
                self._command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self._env
            )
        self.lives.append(Life(process, time.monotonic()))
        self._delays.clear()

    def send(self, number: signal.Signals) -> None:
        if self.life.process.poll() is None:
            self.life.process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does."""
        self.life.end_expected = True
        self.life.process.kill()
        self.life.process.wait()
        self.follow()

    def terminate(self) -> None:
        """Ask it to stop; `ended` says when it has."""
        self.life.end_expected = True
        self.life.process.terminate()

    @property
    def ended(self) -> bool:
        return self.life.process.poll() is not None

    def balance(self) -> dict[str, Any]:
        """Return the balance at the end of a stop, which must have been one in good order."""
        code, lines = self.life.process.wait(), (self.folder / "out").read_text().splitlines()
        self.follow()
        if code or not lines:
            self._findings.add(f"a stop ended with {code}", "\n".join(self.last_lines))
            return {}
        balance: dict[str, Any] = json.loads(lines[-1])
        return balance

    def limit_descriptors(self, count: int | None) -> None:
        """Limit it to `count` more descriptors, or to this process's limit if None."""
        limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if count is not None:
                limit = max(map(int, os.listdir(f"/proc/{self.pid}/fd"))) + 1 + count
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (limit, hard))
        except (OSError, ValueError):
            self._findings.notes["descriptors not limited"] += 1

    def watch(self) -> None:
        """Follow its log; restart it if it has ended by itself."""
        self.follow()
        if self.ended and not self.life.end_expected:
            self._ends += 1
            end = f"ended by itself with {self.life.process.returncode} after {self.life.age_s:.1f} s"
            self._findings.add(end, "\n".join(self.last_lines))
            if self._ends > MOST_ENDS:
                raise GaveUp(f"more than {MOST_ENDS} ends")
            self.restore()
            self.start()
        if not self.ended:
            self._look(time.monotonic())

    def _look(self, now_s: float) -> None:
        if self.life.ready_s is None and self.life.age_s > START_LIMIT_S:
            self._findings.add(f"not ready after {START_LIMIT_S:.0f} s", "\n".join(self.last_lines))
            self.life.ready_s = now_s
        try:
            if now_s >= self._memory_at:
                self._memory_at = now_s + MEMORY_EVERY_S
                self.life.memory.append((round(self.life.age_s, 1), anonymous_mb(self.pid)))
            if now_s >= self._delay_at:
                self._delay_at = now_s + DELAY_EVERY_S
                self._sample_delay(now_s)
        except (OSError, ValueError, IndexError):  # it has just ended
            pass

    def _sample_delay(self, now_s: float) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            self._delays.append((now_s, cpu_delay_s(self.pid)))

    def follow(self) -> None:
        """Read what it has logged."""
        self._rest += self._read.read()
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._line(line.decode(errors="backslashreplace"))

    def _line(self, line: str) -> None:
        self.last_lines.append(line)
        if " ready brokers=" in line and " INFO ready " in line and self.lives:
            self.life.taken_over = "taken_over=true" in line
            self._on_ready(self.life)
            self.life.ready_s = time.monotonic()
        self.refused += "reload refused: " in line
        self.reloaded += " INFO reloaded " in line
        if found := _SLOW.search(line):
            self._slow(found[1], float(found[2]))
        elif _WRONG.search(line):
            self._findings.add("in the log", line)
        if found := _LEVEL.search(line):
            self._findings.notes[f"{found[1]} {re.sub(r'[0-9]+', '0', found[2])[:100]}"] += 1

    def _slow(self, step: str, seconds: float) -> None:
        """Judge a step by the time that it did not wait for a CPU, or for SIGCONT."""
        end = time.monotonic()
        begin = end - seconds
        stopped = sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self.frozen)
        self._sample_delay(end)
        delays = [delay for at, delay in self._delays if at > begin]
        delays = [delay for at, delay in self._delays if at <= begin][-1:] + delays
        waited = min(delays[-1] - delays[0], seconds) if delays else 0.0
        net = seconds - stopped - waited
        self.longest_step_s = max(self.longest_step_s, net)
        if net > STEP_LIMIT_S:
            times = f"{seconds:.1f} s, of which {stopped:.1f} s stopped and {waited:.1f} s waiting for a CPU"
            self._findings.add(f"step {step} took {net:.1f} s", times)


def anonymous_mb(pid: int) -> float:
    """Return the anonymous memory of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    return round(int(found[1]) / 1024, 1) if found else 0.0


def cpu_delay_s(pid: int) -> float:
    """Return for how long the main thread has waited for a CPU so far."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
