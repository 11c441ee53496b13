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
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from producer.sysbpf import program_ids
from tests.kafka.proc import bpf_ids, capabilities
from tests.kafka.traffic import Echo, exchange
from tests.wire import Segment, captured

T = TypeVar("T")

FIN, ACK, SYN_ACK = 0x01, 0x10, 0x12

CHECKOUT, RESULTS = Path("/checkout"), Path("/results")
UNIT = "rebpf.service"
DEADLINE_S = 300
LIVES = {"best": "", "cgroup": 'hooks = ["cgroup_skb", "raw_tp"]'}
"""A setting, by the name of a run: whatever hooks there are, and those that need another capability."""


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
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    metadata = Path(f"/usr/lib/rebpf/rebpf-{version}.dist-info")
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rebpf\nVersion: {version}\n")
    shutil.copy(CHECKOUT / "deploy/systemd" / UNIT, "/etc/systemd/system")
    Path("/etc/rebpf").mkdir(exist_ok=True)
    systemctl("daemon-reload")


def configure(port: int, *settings: str) -> None:
    lines = ["[capture]", f"ports = [{port}]", *settings]
    Path("/etc/rebpf/rebpf.toml").write_text("\n".join(lines) + "\n")


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stderr}\n{journal()[-8000:]}")
    return done.stdout


def journal(since: float = 0) -> str:
    command = ["journalctl", "--no-pager", "-o", "cat", "-u", UNIT, f"--since=@{since:.6f}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def look() -> Sight:
    names = ("ActiveState", "MainPID", "NRestarts", "NFileDescriptorStore")
    lines = systemctl("show", *(f"--property={name}" for name in names), UNIT).splitlines()
    shown = dict(line.split("=", 1) for line in lines)
    state, pid, restarts, stored = shown["ActiveState"], *(int(shown[name]) for name in names[1:])
    programs = sorted(bpf_ids(pid, "prog")) if pid else []
    return Sight(state, pid, restarts, stored, programs, sorted(capabilities(pid)["CapEff"]) if pid else [])


def killed(signal: str = "KILL") -> Sight:
    """Kill the service as a crash does, or let it hang (STOP), and wait until it is there again."""
    old = look()
    subprocess.run(["kill", f"-{signal}", str(old.pid)], check=True)

    def again() -> Sight | None:
        try:
            new = look()
        except (FileNotFoundError, ProcessLookupError):  # it ends at this moment
            return None
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


def life(setting: str) -> dict[str, object]:
    """Start, restart, kill, reload and stop the service under traffic."""
    began = time.time()
    with Echo() as echo:
        configure(echo.port, setting)
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
    wait_for_end(sights["start"].programs)
    # Not read here: for whoever looks for the reason of a difference.
    lines = (json.dumps([*segment, count]) for segment, count in segments.items())
    (RESULTS / f"segments_{echo.port}").write_text("\n".join(lines))
    return {
        "sights": {name: asdict(sight) for name, sight in sights.items()},
        "captured": segments.total(),
        "ipv6_synacks": sum(
            count for each, count in segments.items() if each.tcp_flags & SYN_ACK == SYN_ACK and ":" in each.saddr
        ),
        "late_acks": late_acks(segments),
        "balances": re.findall(r"balance .*", journal(began)),
        "taken_over": journal(began).count("taken_over=true"),
    }


def late_acks(segments: "Counter[Segment]") -> int:
    """Count acknowledgements of a connection's end beyond the first: in time wait they have no socket."""
    ends = {(each.sport, each.dport, each.seq + each.payload_len + 1) for each in segments if each.tcp_flags & FIN}
    return sum(
        count - 1
        for each, count in segments.items()
        if each.tcp_flags == ACK
        and not each.payload_len
        and (each.sport, each.dport, each.seq) in ends
        and (each.dport, each.sport, each.ack_seq) in ends
    )


def change() -> dict[str, object]:
    """Restart the service with another ring, so that it cannot take over the hooks that systemd has kept."""
    configure(1)
    systemctl("start", UNIT)
    before = look()
    configure(1, "transmit_ring_bytes = 1048576")
    systemctl("restart", UNIT)
    wait_for_end(before.programs)
    after = look()
    systemctl("stop", UNIT)
    wait_for_end(after.programs)
    return {"before": asdict(before), "after": asdict(after)}


def hang() -> dict[str, object]:
    """Let the service hang, with a watchdog that is in more of a hurry than the unit's."""
    drop_in = Path(f"/run/systemd/system/{UNIT}.d/hurry.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=10s\nTimeoutAbortSec=1s\n")
    systemctl("daemon-reload")
    configure(1)
    systemctl("start", UNIT)
    before = look()
    said = systemctl("show", "--property=StatusText", UNIT)
    after = killed("STOP")
    systemctl("stop", UNIT)
    wait_for_end(after.programs)
    return {"before": asdict(before), "after": asdict(after), "said": said}


def wait_for_end(programs: list[int]) -> None:
    wait_for("the programs to end", lambda: not set(programs) & program_ids())


def main() -> None:
    install()
    seen: dict[str, object] = {"kernel": os.uname().release}
    try:
        for name, setting in LIVES.items():
            seen[name] = life(setting)
        seen["change"] = change()
        seen["hang"] = hang()
        security = subprocess.run(["systemd-analyze", "security", "--no-pager", UNIT], capture_output=True, text=True)
        seen["security"] = security.stdout
    finally:
        (RESULTS / "journal").write_text(journal())
        (RESULTS / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
