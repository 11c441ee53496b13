"""The benchmark's workloads, and their traffic: a C program (traffic.c) in a network namespace of its own."""

import json
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.servers.fetch import cache

LOSS = 0.25
_EVENTS_PER_LOSSY_SEND = 2.5
"""Data, acknowledgement and, for some, a retransmission in both topics."""
_SOURCE = Path(__file__).parent / "traffic.c"
# Loss in the receiver's prerouting, and of data only: in the output, a drop would be a failed send. TIME_WAIT sockets
# are few, as they would otherwise occupy the ports.
_IN_NAMESPACE = f"""
ip link set lo up
echo 100 > /proc/sys/net/ipv4/tcp_max_tw_buckets
echo "1024 65535" > /proc/sys/net/ipv4/ip_local_port_range
nft -f - <<END
table ip bench {{
    chain loss {{
        type filter hook prerouting priority raw;
        ip daddr 127.9.9.9 ip length > 100 numgen random mod 100 < {LOSS * 100:.0f} drop
    }}
}}
END
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the traffic program is to do: its mode, rate, and number of long connections.

    `lossy_rate`: segments a second on a further connection, which loses a share of LOSS.
    """

    what: str
    mode: str = "long"
    rate: int = 0
    connections: int = 8
    lossy_rate: int = 20

    def arguments(self, port: int, seconds: float) -> list[str]:
        """Return the traffic program's command line. The rate of segments includes those of the lossy connection."""
        rate = self.rate - self.lossy_rate * _EVENTS_PER_LOSSY_SEND if self.mode == "long" else self.rate
        return [self.mode, str(port), str(rate), str(seconds), str(self.connections), str(self.lossy_rate)]


WORKLOADS = {
    "long-60000": Workload("8 long connections, 60,000 events/s", rate=60_000),
    "long-3000": Workload("8 long connections, 3,000 events/s", rate=3_000),
    "short-2000": Workload("2,000 short connections/s, 10 segments each", "short", rate=2_000),
    "short-500": Workload("500 short connections/s, 10 segments each", "short", rate=500),
    "quiet": Workload("a quiet host: 200 events/s", rate=200, lossy_rate=4),
    "alive": Workload("100,000 flows alive, 20,000 events/s", rate=20_000, connections=50_000),
    "million": Workload("8,000 connections/s, reset once open: a million flows", "reset", rate=8_000, lossy_rate=0),
    "idle": Workload("no events", rate=0, connections=1, lossy_rate=0),
}
MILLION_S = 63
"""Seconds after which the workload `million` has had a million flows, two for each connection."""


class Traffic:
    """The traffic of a workload. In the context, its connections are open; `run` sends."""

    def __init__(self, workload: Workload, port: int, seconds: float) -> None:
        self._arguments = workload.arguments(port, seconds)

    def __enter__(self) -> Self:
        command = ["unshare", "--net", "--", "sh", "-c", _IN_NAMESPACE, "sh", str(_build()), *self._arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        if self._output.readline() != "ready\n":
            raise RuntimeError(f"no traffic: expected ready from {' '.join(command[7:])} (needs root)")
        return self

    def run(self) -> int:
        """Send for as long as was asked for, and return the number of segments sent."""
        self._input.write("start\n")
        self._input.flush()
        segments: int = json.loads(self._output.readline())["segments"]
        return segments

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def _build() -> Path:
    """Compile the traffic program, unless the cache has this version of it."""
    binary = cache() / "bench" / f"traffic-{zlib.crc32(_SOURCE.read_bytes()):08x}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-Wall", "-o", binary, _SOURCE], check=True)
    return binary
