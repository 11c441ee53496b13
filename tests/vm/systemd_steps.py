"""What is done to the service on a host with a real systemd, and what is seen of it; root runs it in the guest.

It installs the checkout as a package would, and puts the service through its life under traffic. What it sees is in
/results/seen.json. Nothing but the standard library and what ReBPF needs is there.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from producer.sysbpf import program_ids
from tests.kafka.proc import bpf_ids, capabilities
from tests.kafka.traffic import Echo, exchange
from tests.wire import captured

T = TypeVar("T")

CHECKOUT, RESULTS = Path("/checkout"), Path("/results")
UNIT = "rebpf.service"
DEADLINE_S = 300
LIVES = {"best": "", "cgroup": "cgroup_skb,raw_tp"}
"""Hooks that may be used, by the name of a run: all, and those that need another capability."""

# None: the unit is run as it is.
DRIVER: str | None = """\
[Service]
WorkingDirectory=/checkout
Environment=PYTHONPATH=/usr/lib/rebpf PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1 {hooks}
ExecStart=
ExecStart=/usr/bin/python3 -m tests.kernel.service /var/lib/rebpf/events {port}
"""


@dataclass(frozen=True, slots=True)
class Sight:
    """The service at one moment."""

    state: str
    pid: int
    restarts: int
    stored: int
    programs: list[int]
    capabilities: list[int]


def install() -> None:
    for name in ("producer", "bpf", "schemas"):
        shutil.copytree(CHECKOUT / name, Path("/usr/lib/rebpf") / name, dirs_exist_ok=True)
    shutil.copy(CHECKOUT / "deploy/systemd" / UNIT, "/etc/systemd/system")
    Path("/etc/rebpf").mkdir(exist_ok=True)


def configure(port: int, hooks: str) -> None:
    lines = ["[capture]", f"ports = [{port}]"]
    if hooks:
        lines.append(f"hooks = {json.dumps(hooks.split(','))}")
    Path("/etc/rebpf/rebpf.toml").write_text("\n".join(lines) + "\n")
    if DRIVER is not None:
        folder = Path(f"/etc/systemd/system/{UNIT}.d")
        folder.mkdir(exist_ok=True)
        (folder / "driver.conf").write_text(
            DRIVER.format(port=port, hooks=f"REBPF_TEST_HOOKS={hooks}" if hooks else "")
        )
    systemctl("daemon-reload")


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stderr}\n{journal()[-8000:]}")
    return done.stdout


def journal() -> str:
    command = ["journalctl", "--no-pager", "-o", "cat", "-u", UNIT]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def look() -> Sight:
    names = ("ActiveState", "MainPID", "NRestarts", "NFileDescriptorStore")
    lines = systemctl("show", *(f"--property={name}" for name in names), UNIT).splitlines()
    shown = dict(line.split("=", 1) for line in lines)
    state, pid, restarts, stored = shown["ActiveState"], *(int(shown[name]) for name in names[1:])
    programs = sorted(bpf_ids(pid, "prog")) if pid else []
    return Sight(state, pid, restarts, stored, programs, sorted(capabilities(pid)["CapEff"]) if pid else [])


def killed() -> Sight:
    """Kill the service as a crash does, and wait until it is there again."""
    old = look()
    subprocess.run(["kill", "-KILL", str(old.pid)], check=True)

    def again() -> Sight | None:
        new = look()
        if new.state == "failed":
            raise RuntimeError(f"{UNIT} has failed:\n{journal()[-8000:]}")
        return new if new.pid not in (0, old.pid) and new.state == "active" else None

    return wait_for("the service to be active again", again)


def wait_for(what: str, condition: Callable[[], T | None]) -> T:
    """Return the condition's first value that is neither None nor False."""
    end = time.monotonic() + DEADLINE_S
    while (value := condition()) is None or value is False:
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}:\n{journal()[-8000:]}")
        time.sleep(0.1)
    return value


@contextmanager
def traffic(port: int) -> Iterator[None]:
    """Exchange segments all the time, in connections that end in good order."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.05):
            exchange(port, 2)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def life(hooks: str) -> dict[str, object]:
    """Start, restart, kill, reload and stop the service under traffic."""
    with Echo() as echo:
        configure(echo.port, hooks)
        systemctl("start", UNIT)
        sights = {"start": look()}
        with captured(echo.port) as segments:
            with traffic(echo.port):
                systemctl("restart", UNIT)
                sights["restart"] = look()
                sights["kill"] = killed()
                sights["second kill"] = killed()
            exchange(echo.port, 7)
        systemctl("reload", UNIT)
        sights["reload"] = look()
        systemctl("stop", UNIT)
        sights["stop"] = look()
    programs = sights["start"].programs
    wait_for("the programs to end", lambda: not set(programs) & program_ids())
    return {
        "sights": {name: asdict(sight) for name, sight in sights.items()},
        "captured": segments.total(),
        "ipv6_synacks": sum(
            count for segment, count in segments.items() if segment.tcp_flags & 0x12 == 0x12 and ":" in segment.saddr
        ),
        "balances": re.findall(r"balance .*", journal()),
        "taken_over": journal().count("taken_over=true"),
    }


def main() -> None:
    install()
    seen: dict[str, object] = {"kernel": os.uname().release}
    try:
        for name, hooks in LIVES.items():
            seen[name] = life(hooks)
            subprocess.run(["journalctl", "--rotate", "--vacuum-time=1s"], check=True, capture_output=True)
        security = subprocess.run(["systemd-analyze", "security", "--no-pager", UNIT], capture_output=True, text=True)
        seen["security"] = security.stdout
    finally:
        (RESULTS / "journal").write_text(journal())
        (RESULTS / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
