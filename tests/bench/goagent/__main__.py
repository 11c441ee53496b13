"""Start the Go agent: build it, load and attach the producer's own programs, and become it.

python -m tests.bench.goagent BROKERS PORT [CODEC]. Says "ready" on standard error, ends on SIGTERM, prints a balance.

Maps and links pass to the Go program as inherited descriptors, and it keeps this process's id.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from producer.host.cgroups import cgroup2_root
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from tests.support.rules import filtered
from tests.support.servers.fetch import cache

HERE = Path(__file__).parent


def build() -> Path:
    """Compile the Go program into the cache, and return it."""
    binary = cache() / "bench" / "goagent"
    subprocess.run(["go", "build", "-o", binary, "."], cwd=HERE, check=True)
    return binary


def main(brokers: str, port: int, codec: str = "") -> None:
    """Replace this process by the Go program."""
    binary = build()
    settings = CaptureSettings(rules=filtered(ports=(port,)), cache=cache() / "bench" / "programs")
    hooks = Capture(settings)  # never closed: the descriptors live on in the Go program
    hooks.load()
    hooks.attach()
    maps = {name: hooks._maps[name] for name in ("transmit_pipe", "retransmit_pipe", "counters", "own_sockets")}
    for descriptor in (*maps.values(), *hooks._links):
        os.set_inheritable(descriptor, True)
    options = {
        "brokers": brokers,
        "codec": codec or "lz4",
        "host": socket.gethostname(),
        "cgroup-root": str(cgroup2_root() or ""),
        "links": ",".join(map(str, hooks._links)),
        **{name.replace("_", "-"): str(descriptor) for name, descriptor in maps.items()},
    }
    os.execv(binary, [str(binary), *(f"-{name}={value}" for name, value in options.items())])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
