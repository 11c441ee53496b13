"""Two network namespaces connected by a lossy veth pair, with TCP counters that nothing else on the host changes.

The namespaces have no names: each lives as long as a process that waits on a pipe from here, and the veth pair lives
inside them. So everything is cleaned up when the lab ends, even if this process is killed. Packets are dropped in the
receiver's prerouting: in the sender's output, a drop would be a failed send, which TCP does not count as sent.
"""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from producer.errors import PermissionDenied, UnavailableError
from producer.host.python_child import python
from producer.host.tcp_counters import parse_counters

_INTERFACE = "veth0"
_CLOSE_TIMEOUT_S = 60
# The states in /proc/net/tcp that send nothing: TIME_WAIT and LISTEN.
_SILENT_STATES = {"06", "0A"}


@dataclass(frozen=True, slots=True)
class Host:
    """One of the two namespaces; the process `pid` keeps it alive."""

    name: str
    pid: int
    ipv4: str
    ipv6: str

    @property
    def netns(self) -> int:
        """Inode number of the namespace, as in the field netns of events."""
        return os.stat(f"/proc/{self.pid}/ns/net").st_ino

    def command(self, *argv: str) -> list[str]:
        """Return the command line that runs `argv` in the namespace."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *argv]

    def counters(self) -> dict[str, int]:
        """Read the namespace's TCP counters, of /proc/net/snmp and /proc/net/netstat, by the kernel's names."""
        folder = Path(f"/proc/{self.pid}/net")
        return parse_counters((folder / "snmp").read_text() + (folder / "netstat").read_text())

    def open_connections(self) -> int:
        """Count the connections that may still send segments."""
        folder = Path(f"/proc/{self.pid}/net")
        rows = [row for name in ("tcp", "tcp6") for row in (folder / name).read_text().splitlines()[1:]]
        return sum(row.split()[3] not in _SILENT_STATES for row in rows)


@dataclass(frozen=True, slots=True)
class Sent:
    """Totals of the traffic generator."""

    connections: int
    failed: int
    payload_bytes: int


class Lab:
    """The two hosts, `client` and `server`, while the context lasts. Needs root, iproute2 and nftables."""

    client: Host
    server: Host

    def __init__(self, loss: float = 0.01) -> None:
        self._loss = loss
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise PermissionDenied("network namespaces need root: run it with sudo")
        with self._stack as stack:
            self.client = self._host("client", 1)
            self.server = self._host("server", 2)
            self._join()
            for host in self.hosts:
                self._lose(host)
            self._start_server()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both hosts."""
        return self.client, self.server

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses of both hosts."""
        return tuple(address for host in self.hosts for address in (host.ipv4, host.ipv6))

    def counters(self) -> dict[str, int]:
        """Return the TCP counters of both hosts together; they started at 0 with the lab."""
        client, server = (host.counters() for host in self.hosts)
        return {name: client[name] + server[name] for name in client}

    def traffic(self, duration_s: float, stop: threading.Event | None = None) -> Sent:
        """Send bulk transfers, short connections and small messages from client to server until the time is over.

        Returns when all connections are closed. `stop` ends it early.
        """
        argv = self.client.command(*_traffic("send", self.server.ipv4, self.server.ipv6))
        with _pipe_bound(argv, "the traffic generator") as sender:
            (stop or threading.Event()).wait(duration_s)
            assert sender.stdin is not None
            sender.stdin.close()
            sender.stdin = None
            try:
                report, complaint = sender.communicate(timeout=_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired as exc:
                raise UnavailableError(f"connections are still open after {_CLOSE_TIMEOUT_S} s: too much loss") from exc
        if sender.returncode != 0:
            raise UnavailableError(f"the traffic generator: {complaint.strip()}")
        return Sent(**json.loads(report))

    def wait_idle(self, timeout_s: float = 20) -> bool:
        """Wait until no connection can still send; return False on a timeout."""
        deadline = time.monotonic() + timeout_s
        while any(host.open_connections() for host in self.hosts):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _host(self, name: str, number: int) -> Host:
        # The shell reports that the namespace exists; then cat keeps it until the pipe from here closes.
        argv = ["unshare", "--net", "--", "sh", "-c", "echo ready; exec cat"]
        keeper = self._stack.enter_context(_pipe_bound(argv, "network namespace"))
        pid = os.getpid()
        # A subnet of four addresses per process, so that the filter of a producer excludes the traffic of other labs.
        block = 4 * (pid % (1 << 14))
        ipv4 = f"10.111.{block >> 8}.{(block & 0xFF) + number}"
        return Host(name, keeper.pid, ipv4, f"fd6f:{pid >> 16:x}:{pid & 0xFFFF:x}::{number:x}")

    def _join(self) -> None:
        veth = ("ip", "link", "add", _INTERFACE, "type", "veth")
        _run(self.client.command(*veth, "peer", "name", _INTERFACE, "netns", str(self.server.pid)))
        for host in self.hosts:
            _run(host.command("ip", "address", "add", f"{host.ipv4}/30", "dev", _INTERFACE))
            _run(host.command("ip", "address", "add", f"{host.ipv6}/64", "dev", _INTERFACE, "nodad"))
            for interface in ("lo", _INTERFACE):
                _run(host.command("ip", "link", "set", interface, "up"))

    def _lose(self, host: Host) -> None:
        if self._loss:
            _run(host.command("nft", "-f", "-"), _loss_rules(self._loss))

    def _start_server(self) -> None:
        argv = self.server.command(*_traffic("serve", self.server.ipv4, self.server.ipv6))
        self._stack.enter_context(_pipe_bound(argv, "the traffic server"))


def _loss_rules(loss: float) -> str:
    return f"""
    table inet lab {{
        chain loss {{
            type filter hook prerouting priority raw;
            meta l4proto tcp numgen random mod 1000000 < {round(loss * 1e6)} drop
        }}
    }}
    """


def _traffic(*arguments: str) -> tuple[str, ...]:
    return python("producer.demo.traffic", *arguments)


def _run(argv: Sequence[str], text: str = "") -> None:
    result = subprocess.run(argv, input=text, capture_output=True, text=True)
    if result.returncode != 0:
        what = " ".join(argv[argv.index("--") + 1 :])
        raise UnavailableError(f"{what}: {result.stderr.strip()} (the lab needs iproute2 and nftables)")


@contextlib.contextmanager
def _pipe_bound(argv: Sequence[str], what: str) -> Iterator["subprocess.Popen[Any]"]:
    """Run a child that reports when it is ready and ends with its standard input, so it never outlives this process."""
    child = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C in the terminal signals only this process, which then stops the children.
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline().strip() != "ready":
            raise UnavailableError(f"{what}: {child.stderr.read().strip()}")
        yield child
    finally:
        child.kill()
        child.communicate()
