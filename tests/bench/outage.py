"""A long outage: the producer's memory and disk use, how fast it catches up, and whether everything arrives.

python -m tests.bench.outage [--outage-s 600] [--sends 11000]

Real segments on loopback (about 1.8 events per send) and a real Kafka that is killed and restarted under traffic. The
topic is checked by `rebpf verify` and against the traffic's own counts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.faults import rss_anon_kb
from tests.support.load import SteadyScene
from tests.support.rebpf import wait_until
from tests.support.servers.kafka import KafkaServer
from tests.support.traffic import Steady

WARM_S = 20.0
HOUR_S = 3600.0


def report(scene: SteadyScene, what: str, started: float) -> None:
    """Print where events are, and the use of memory and disk."""
    account = scene.account()
    counts = " ".join(f"{name}={account[name]}" for name in ("delivered", "in_flight", "spooled", "in_ring"))
    memory = rss_anon_kb(scene.run.pid) / 1024
    disk = account["spool_bytes"] / (1 << 20)
    print(f"{time.monotonic() - started:6.0f} s {what}: {counts} memory={memory:.0f}MB disk={disk:.0f}MiB", flush=True)


def watch(scene: SteadyScene, what: str, seconds: float, started: float) -> None:
    """Report ten times."""
    for _ in range(10):
        time.sleep(seconds / 10)
        report(scene, what, started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outage-s", type=float, default=600)
    parser.add_argument("--sends", type=int, default=11_000, help="segments sent a second, before acknowledgements")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, KafkaServer(Path(name) / "kafka", num_partitions=4) as kafka:
        folder = Path(name) / "outage"
        folder.mkdir()
        scene = SteadyScene(folder, kafka)
        with scene.run, Steady(scene.port, arguments.sends) as traffic:
            started = time.monotonic()
            watch(scene, "before", WARM_S, started)
            before = scene.account()
            kafka.kill()
            watch(scene, "outage", arguments.outage_s, started)
            kafka.start()
            back, at_back = scene.account(), time.monotonic()
            while (now := scene.account())["spooled"]:
                time.sleep(1)
                report(scene, "replay", started)
            taken = time.monotonic() - at_back
            new = now["passed"] - back["passed"]
            rate = (now["delivered"] - back["delivered"]) / taken
            print(f"replay: {taken:.0f} s, {rate:.0f} events/s delivered, {new / taken:.0f}/s of them new")
            traffic.stop()
            wait_until("all is delivered", lambda: scene.account()["delivered"] == scene.account()["passed"])
            balance = scene.finish()
        print(f"balance: {balance}; {balance['passed'] - before['passed']} events since the outage began")
        config = folder / "verify.toml"
        config.write_text(f'[kafka]\ntopic_prefix = "{scene.prefix}"\n')
        verify = [sys.executable, "-m", "producer", "verify", "--config", config, "--brokers", kafka.bootstrap]
        subprocess.run(verify, check=False, env={**os.environ}, timeout=HOUR_S)


if __name__ == "__main__":
    main()
