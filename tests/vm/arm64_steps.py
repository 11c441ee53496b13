"""The package's producer on the arm64 guest, which publishes lossy traffic to a Kafka outside of it; run there by root.

The observations are in /results/seen.json. The configuration is CONFIG, with Kafka's address.
"""

import json
import platform
import re
import subprocess
from pathlib import Path

from producer.demo.lab import Lab
from tests.support.rebpf import wait_until

CONFIG = Path("/run/rebpf.toml")
RESULTS = Path("/results")
LOG = RESULTS / "producer.log"
RETRANSMITS = 50
"""Minimum number of retransmissions."""
_LOSS = 0.03
_TRAFFIC_S = 5.0
_DEADLINE_S = 600.0


def main() -> None:
    with Lab(_LOSS) as lab, LOG.open("wb") as log:
        addresses = [word for address in lab.addresses for word in ("--address", address)]
        run = ["rebpf", "run", "--json", "--config", CONFIG, "--state-dir", "/tmp/state", *addresses]
        with subprocess.Popen(run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as producer:
            ready = wait_until("the producer is ready", lambda: _ready(producer), _DEADLINE_S)
            while lab.counters()["RetransSegs"] < RETRANSMITS:
                lab.traffic(_TRAFFIC_S)
            wait_until("all connections are closed", lambda: lab.wait_idle(), _DEADLINE_S)
            producer.terminate()
            output, _ = producer.communicate(timeout=_DEADLINE_S)
        seen = {
            "machine": platform.machine(),
            "ready": dict(re.findall(r"(\S+)=(\S+)", ready)),
            "counters": lab.counters(),
            "status": producer.returncode,
            "balance": json.loads(output.splitlines()[-1]),
        }
    (RESULTS / "seen.json").write_text(json.dumps(seen))


def _ready(producer: "subprocess.Popen[bytes]") -> str | None:
    if producer.poll() is not None:
        raise RuntimeError(f"the producer ended with {producer.returncode}: {LOG.read_text()}")
    found = re.search(r" ready .*", LOG.read_text())
    return found and found[0]


if __name__ == "__main__":
    main()
