"""All that a chaos run starts: servers, lab, disk, traffic, oracle and producer, and how each is put right again."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from confluent_kafka.schema_registry import SchemaRegistryClient

from producer.demo.lab import Lab
from producer.host.cgroups import cgroup2_root
from tests.chaos.account import TopicAccount
from tests.chaos.findings import Findings
from tests.chaos.producer import Life, Producer
from tests.chaos.proxy import Proxy
from tests.chaos.traffic import BLACKHOLE_PORT, LOSSY_PORT
from tests.support.rebpf import rebpf
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import free_port
from tests.support.servers.registry import SchemaRegistry

TOPICS = ("tcp_transmit", "tcp_retransmit", "tcp_flow")
HOST = "chaos"
LOSS_PERCENT = 2
DISK_BYTES = 96 << 20
TOPIC_BYTES = 4 << 30
EVENTS_PER_SEND = 1.8
"""Each message is an event, and so are most of its acknowledgements."""
POLL_EVERY_S = 1.0
STEER_EVERY_S, STEER_S, MOST_FACTOR = 5.0, 60.0, 1.6


def python(*arguments: object) -> list[str]:
    """Return the command line of a module of ours, which dies with the thread that starts it."""
    return ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", *map(str, arguments)]


class Scene:
    """Everything runs while it is entered. `folder` is empty; processes are started by the thread that enters."""

    def __init__(self, folder: Path, events_per_s: float, findings: Findings) -> None:
        self.folder = folder
        self.findings = findings
        self.events_per_s = events_per_s
        self.sends_per_s = events_per_s / EVENTS_PER_SEND
        self._began_s = self._steer_at = 0.0
        self.accounts = {topic: TopicAccount() for topic in TOPICS}
        self.lock = threading.Lock()
        """Of the accounts, and of what the poller sees."""
        self.unhealthy: list[tuple[float, str]] = []
        self.answered_s = time.monotonic()
        self._stack = contextlib.ExitStack()
        self._has_traffic = True
        self.waiting: dict[str, int] = {}
        """By topic, the events that are not delivered yet."""

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.kafka = KafkaServer(self.folder / "kafka", num_partitions=2)
            self.registry = SchemaRegistry(self.folder / "registry")
            for server in (self.kafka, self.registry):
                stack.callback(server.stop)
                server.launch()
            for server in (self.kafka, self.registry):
                server.wait_until_ready()
            self.proxy = stack.enter_context(Proxy(self.registry.url))
            self.lab = stack.enter_context(Lab(0))
            self._lose()
            self.disk = stack.enter_context(mounted(self.folder / "disk", "tmpfs", f"size={DISK_BYTES},mode=0700"))
            self.pins = stack.enter_context(mounted(self.folder / "bpf", "bpf")) / "pins"
            self.cgroup = stack.enter_context(cgroup())
            self.clock = self.folder / "clock"
            self.step_clock(0)
            self.listen = free_port()
            self._init()
            self.oracle = self._start_oracle()
            stack.callback(end, self.oracle)
            self.traffic = self._start_traffic()
            stack.callback(end, self.traffic)
            arguments: list[object] = ["--state-dir", self.disk / "state", "--pin", self.pins]
            self.producer = Producer(self.folder, arguments, self._env(), self.findings, self.config(), self._on_ready)
            self.producer.restore()
            self.producer.start()
            stack.callback(lambda: end(self.producer.life.process))
            self._poll_until = threading.Event()
            poller = threading.Thread(target=self._poll, daemon=True)
            stack.callback(poller.join, 20)
            stack.callback(self._poll_until.set)
            poller.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def has_clock(self) -> bool:
        """Whether the producer's clock can be stepped: with a C compiler."""
        return shutil.which("cc") is not None

    def step_clock(self, step_s: float) -> None:
        """Set the difference between the producer's clock and the machine's."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:  # in place: it is mapped
            file.write(struct.pack("q", int(step_s * 1e9)))

    def config(self, rules: str = "") -> bytes:
        """Return a configuration; `rules` come before the one that keeps the lab's traffic."""
        lab = json.dumps([*self.lab.addresses])
        return f"""
            host = "{HOST}"
            kafka.brokers = "{self.kafka.bootstrap}"
            registry = {{ url = "{self.proxy.url}", timeout_s = 2.0 }}
            metrics.listen = "127.0.0.1:{self.listen}"
            spool = {{ transmit_bytes = {48 << 20}, retransmit_bytes = {8 << 20}, spill_after_s = 1.0 }}
            [capture]
            transmit_ring_bytes = {1 << 28}
            retransmit_ring_bytes = {1 << 24}
            default = "drop"
            {rules}
            [[rules]]
            name = "lab"
            address = {lab}
        """.encode()

    def _lose(self) -> None:
        """Lose segments of some ports in the receiver's prerouting."""
        rules = f"""
            table inet chaos {{
                chain loss {{
                    type filter hook prerouting priority raw;
                    tcp dport {BLACKHOLE_PORT} drop
                    tcp dport {LOSSY_PORT} numgen random mod 100 < {LOSS_PERCENT} drop
                    tcp sport {LOSSY_PORT} numgen random mod 100 < {LOSS_PERCENT} drop
                }}
            }}
        """
        for host in self.lab.hosts:
            subprocess.run(host.command("nft", "-f", "-"), input=rules, text=True, check=True)

    def _init(self) -> None:
        """Create the topics, with unlimited retention time, as the oracle may lag behind."""
        (self.folder / "init.toml").write_bytes(self.config())
        done = rebpf("init", "--config", self.folder / "init.toml", "--partitions", 2)
        if done.returncode:
            raise RuntimeError(done.stderr)
        for topic in TOPICS:
            kept = {"retention.ms": "-1", "retention.bytes": str(TOPIC_BYTES), "segment.bytes": str(128 << 20)}
            self.kafka.set_topic(topic, kept)
        with SchemaRegistryClient({"url": self.registry.url, "timeout": 10}) as client:
            self.schema_ids = {topic: client.get_latest_version(f"{topic}-value").schema_id for topic in TOPICS}

    def _start_oracle(self) -> "subprocess.Popen[str]":
        topics = [f"{topic}={number}" for topic, number in self.schema_ids.items()]
        return self._piped("oracle", python("tests.chaos.oracle", self.kafka.bootstrap, HOST, *topics))

    def _start_traffic(self) -> "subprocess.Popen[str]":
        addresses = (self.lab.server.ipv4, self.lab.server.ipv6)
        traffic = python("tests.chaos.traffic", self.sends_per_s, *addresses)
        return self._piped("traffic", self.lab.client.command(*traffic))

    def _piped(self, name: str, argv: list[str]) -> "subprocess.Popen[str]":
        with (self.folder / f"{name}.err").open("w") as err:
            child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True)
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name}: {(self.folder / f'{name}.err').read_text()}")
        return child

    def _env(self) -> dict[str, str]:
        if not self.has_clock:
            return {}
        return {"LD_PRELOAD": str(clock_library(self.folder)), "CHAOS_CLOCK": str(self.clock)}

    def watch(self) -> None:
        """Check the child processes, and what the poller saw."""
        self.producer.watch()
        self._steer()
        with self.lock:
            seen, self.unhealthy = self.unhealthy, []
        for at_s, what in seen:
            if not any(since - 1 <= at_s <= until + 15 for since, until in self.producer.frozen):
                self.findings.add("/healthz", what)
        for name, child in (("oracle", self.oracle), ("traffic", self.traffic)):
            if self._has_traffic and child.poll() is not None:
                raise RuntimeError(f"{name} ended: {(self.folder / f'{name}.err').read_text()}")

    def _steer(self) -> None:
        """Adjust the traffic to the target rate of events."""
        now = time.monotonic()
        if now < self._steer_at or not self._has_traffic:
            return
        self._steer_at = now + STEER_EVERY_S
        with self.lock:
            numbered = sum(account.numbered for account in self.accounts.values())
        self._began_s = self._began_s or now - numbered / self.events_per_s
        behind_s = now - self._began_s - numbered / self.events_per_s
        assert self.traffic.stdin is not None
        factor = min(MOST_FACTOR, max(1 / MOST_FACTOR, 1 + behind_s / STEER_S))
        self.traffic.stdin.write(f"{self.sends_per_s * factor:.0f}\n")
        self.traffic.stdin.flush()

    def end_traffic(self) -> None:
        self._has_traffic = False
        self.traffic.communicate(timeout=60)

    def _poll(self) -> None:
        """Poll health and balance, in a thread."""
        while not self._poll_until.wait(POLL_EVERY_S):
            if not self.producer.ready:
                continue
            with contextlib.suppress(OSError, ValueError):
                self._note_health()
                self._note_balance()
                self.answered_s = time.monotonic()

    def _note_health(self) -> None:
        try:
            self._ask("healthz")
        except urllib.error.HTTPError as error:
            if self.producer.life.end_expected:  # a shutdown makes no steps
                return
            with self.lock:
                self.unhealthy.append((time.monotonic(), f"{error.code} {error.read().decode(errors='replace')}"))

    def _note_balance(self) -> None:
        life = len(self.producer.lives)
        status = json.loads(self._ask("status"))
        with self.lock:
            if (
                status["pid"] != self.producer.pid
                or life != len(self.producer.lives)
                or self.producer.life.end_expected
            ):
                return
            for stream in status["streams"]:
                self._note(stream["topic"], stream, {loss["reason"]: loss["count"] for loss in stream["lost"]})

    def note_end(self, balances: dict[str, Any]) -> None:
        """Add the balances of an orderly stop, after which rings are new."""
        with self.lock:
            for topic, balance in balances.items():
                self._note(topic, balance, balance["lost"])
                self.accounts[topic].new_rings()

    def _on_ready(self, life: Life) -> None:
        with self.lock:
            if not life.taken_over:
                for account in self.accounts.values():
                    account.new_rings()

    def _note(self, topic: str, balance: dict[str, Any], lost: dict[str, int]) -> None:
        waiting = sum(balance[name] for name in ("in_flight", "in_ring", "spooled"))
        self.accounts[topic].note(balance["passed"], balance["carried"], balance["delivered"], waiting, lost)
        self.waiting[topic] = waiting

    def _ask(self, page: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.listen}/{page}", timeout=10) as answer:
            content: bytes = answer.read()
        return content


def clock_library(folder: Path) -> Path:
    """Compile the library that steps a process's clock."""
    library, source = folder / "clock.so", Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@contextlib.contextmanager
def mounted(folder: Path, kind: str, *options: str) -> Iterator[Path]:
    """Mount a new file system until the context is left."""
    folder.mkdir()
    subprocess.run(["mount", "-t", kind, *(["-o", *options] if options else []), kind, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup, removed with everything left in it."""
    root = cgroup2_root()
    if root is None:
        raise RuntimeError("no cgroup v2 hierarchy is mounted")
    folder = root / f"rebpf-chaos-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        for path, _, _ in os.walk(os.fsencode(folder), topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def end(child: "subprocess.Popen[Any]") -> None:
    """Kill a child, which may be stopped or have ended."""
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGCONT)
        child.kill()
    child.wait()
