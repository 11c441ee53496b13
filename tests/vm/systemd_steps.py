"""The package on a host with a real systemd, from its installation to its purge; root runs this in the guest.

The observations are in /results/seen.json. The package is /results/rebpf.deb, its upgrade /results/upgrade.deb, and
/results/brokers has Kafka's address. Uses only the standard library.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.support.traffic import Echo, exchange
from tests.support.wire import Segment, captured, late_acks
from tests.vm import systemd_lossy as lossy
from tests.vm.systemd_service import (
    UNIT,
    Sight,
    cgroup,
    drop_in,
    journal,
    killed,
    look,
    no_drop_ins,
    refused,
    shown,
    systemctl,
    wait_for,
    wait_for_end,
)

SYN_ACK = 0x12
RETRANSMITS = 20
"""Minimum number of retransmissions on the lossy path."""

RESULTS = Path("/results")
PACKAGE, UPGRADE = Path("/root/rebpf.deb"), Path("/root/upgrade.deb")
SECRET = Path("/root/secret")
CONFIG = Path("/etc/rebpf/rebpf.toml")
LEFTOVERS = ("/etc", "/run", "/usr", "/var")

seen: dict[str, object] = {"kernel": os.uname().release}


def apt(*arguments: str) -> None:
    command = ["apt-get", "-y", *arguments]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def version() -> str:
    """Return the version of the installed package."""
    command = ["dpkg-query", "--show", "--showformat=${Version}", "rebpf"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def configure(brokers: str, *more: str) -> None:
    """Change the one line of the package's file, and append others."""
    text, changed = re.subn(r'^brokers = "".*$', f'brokers = "{brokers}"', seen["installed"], flags=re.MULTILINE)
    assert changed == 1, seen["installed"]
    CONFIG.write_text("\n".join([text, *more, ""]))


@contextmanager
def traffic(port: int) -> Iterator[None]:
    """Exchange segments continuously, in connections with orderly ends."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.2):
            exchange(port, 2)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def refusals() -> None:
    """Start it as installed, and without the capabilities."""
    seen["no brokers"] = refused()
    configure("localhost:1")
    drop_in("bare", "ExecStartPre=", "AmbientCapabilities=", "CapabilityBoundingSet=")
    seen["no capabilities"] = refused()
    no_drop_ins()


def checks_are_tried_again() -> None:
    """Show why the unit's check before a start has no influence: systemd restarts it whatever the status."""
    settings = ["ExecStartPre=/bin/sh -c 'exit 78'", "ExecStart=/bin/true", "Restart=always", "RestartSec=100ms"]
    lines = ["[Unit]", "StartLimitIntervalSec=0", "[Service]", *settings, "RestartPreventExitStatus=78", ""]
    Path("/run/systemd/system/trial.service").write_text("\n".join(lines))
    subprocess.run(["systemctl", "start", "trial"], capture_output=True)
    wait_for("another start", lambda: int(shown("NRestarts", unit="trial")["NRestarts"]) > 1)
    systemctl("stop", "trial")


def life(brokers: str) -> None:
    """With one line of configuration: start, lose packets, restart, kill, hang, upgrade, reload and stop."""
    began = time.time()
    configure(brokers)
    netns = lossy.build()
    drop_in("hurry", "WatchdogSec=15s", "TimeoutAbortSec=1s")
    with Echo() as echo:
        systemctl("start", UNIT)
        sights = {"start": look()}
        drop_in("brief", "ExecStartPre=")  # already tested, and takes ten seconds without KVM
        lossy.send_until(RETRANSMITS)
        seen["lossy"] = {netns[name]: lossy.retransmits(name) for name in netns}
        seen["security"] = security()
        seen["memory"] = {"peak": cgroup("memory.peak"), "events": cgroup("memory.events")}
        with captured(echo.port) as segments:
            with traffic(echo.port):
                systemctl("restart", UNIT)
                sights["restart"] = look()
                sights["kill"] = killed()
                sights["hang"] = killed("STOP")
                seen["said"] = systemctl("show", "--property=StatusText", UNIT)
                apt("install", str(UPGRADE))
                sights["upgrade"] = look()
            exchange(echo.port, 7)
        systemctl("reload", UNIT)
        sights["reload"] = look()
        systemctl("stop", UNIT)
        sights["stop"] = look()
    wait_for_end(sights["start"].programs)
    seen["balance"] = re.findall(r"^balance (.*)$", journal(began), re.MULTILINE)[-1]
    tell("best", echo.port, sights, segments)


def other_life(brokers: str) -> None:
    """With the hooks that need another capability, and a secret: start, restart and kill; then replace the hooks.

    Without the secret, the configuration would be wrong, and there would be no start.
    """
    SECRET.write_text("what only root can read\n")
    SECRET.chmod(0o600)
    drop_in("secret", f"LoadCredential=kafka:{SECRET}")
    secret = ("[kafka.settings]", '"sasl.password" = "@kafka"')
    configure(brokers, "[capture]", 'hooks = ["cgroup_skb", "raw_tp"]', *secret)
    with Echo() as echo:
        systemctl("start", UNIT)
        sights = {"start": look()}
        with captured(echo.port) as segments:
            with traffic(echo.port):
                systemctl("restart", UNIT)
                sights["restart"] = look()
                sights["kill"] = killed()
            exchange(echo.port, 7)
        configure(brokers)
        systemctl("restart", UNIT)
        wait_for_end(sights["kill"].programs)
        sights["change"] = look()
    tell("cgroup", echo.port, sights, segments)


def tell(name: str, port: int, sights: dict[str, Sight], segments: "Counter[Segment]") -> None:
    seen[name] = {
        "port": port,
        "sights": {moment: asdict(sight) for moment, sight in sights.items()},
        "captured": segments.total(),
        "ipv6_synacks": sum(
            count for each, count in segments.items() if each.tcp_flags & SYN_ACK == SYN_ACK and ":" in each.saddr
        ),
        "late_acks": late_acks(segments).total(),
    }
    # Not read by the tests; for debugging.
    lines = (json.dumps([*segment, count]) for segment, count in segments.items())
    (RESULTS / f"segments_{name}").write_text("\n".join(lines))


def security() -> str:
    command = ["systemd-analyze", "security", "--no-pager", UNIT]
    return subprocess.run(command, capture_output=True, text=True).stdout


def end_of_all() -> None:
    """Remove the package while it runs, and purge it."""
    programs = look().programs
    apt("remove", "rebpf")
    wait_for_end(programs)
    no_drop_ins()
    seen["removed"] = [str(path) for path in (CONFIG, Path("/var/lib/rebpf")) if path.exists()]
    apt("purge", "rebpf")
    found = subprocess.run(
        ["find", *LEFTOVERS, "-xdev", "-iname", "*rebpf*"], capture_output=True, text=True, check=True
    ).stdout
    known = subprocess.run(["getent", "passwd", "rebpf"], capture_output=True, text=True).stdout
    units = subprocess.run(["systemctl", "cat", UNIT], capture_output=True, text=True).stdout
    seen["purged"] = {"files": found.split(), "user": known, "unit": units}


def steps(brokers: str) -> None:
    for package in (PACKAGE, UPGRADE):
        shutil.copy(RESULTS / package.name, package)
    began = time.monotonic()

    def clock(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s: {what}", flush=True)

    apt("install", str(PACKAGE))
    seen["installed"] = CONFIG.read_text()
    seen["versions"] = [version()]
    clock("installed")
    refusals()
    checks_are_tried_again()
    clock("refusals")
    life(brokers)
    seen["versions"] += [version()]
    clock("life")
    other_life(brokers)
    clock("other life")
    end_of_all()
    clock("purged")


def main() -> None:
    try:
        steps((RESULTS / "brokers").read_text())
    finally:
        (RESULTS / "journal").write_text(journal())
        (RESULTS / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
