"""The service on a host with a real systemd, as root sees and controls it."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.support.procfs import bpf_ids, capabilities
from tests.support.programs import program_ids

T = TypeVar("T")

UNIT = "rebpf.service"
DROP_INS = Path(f"/run/systemd/system/{UNIT}.d")
DEADLINE_S = 300
_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


@dataclass(frozen=True, slots=True)
class Sight:
    """A snapshot of the service."""

    state: str
    pid: int
    restarts: int
    stored: int
    programs: list[int]
    uid: str
    capabilities: list[int]
    """Capabilities of any thread, in any set except the bounding one."""


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stderr}\n{journal()[-8000:]}")
    return done.stdout


def journal(since: float = 0) -> str:
    subprocess.run(["journalctl", "--sync"], capture_output=True)  # otherwise the last lines may still be missing
    command = ["journalctl", "--no-pager", "-o", "cat", "-u", UNIT, f"--since=@{since:.6f}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def shown(*names: str, unit: str = UNIT) -> dict[str, str]:
    lines = systemctl("show", *(f"--property={name}" for name in names), unit).splitlines()
    return dict(line.split("=", 1) for line in lines)


def look() -> Sight:
    names = ("MainPID", "NRestarts", "NFileDescriptorStore")
    properties = shown("ActiveState", *names)
    pid, restarts, stored = (int(properties[name]) for name in names)
    state = properties["ActiveState"]
    if not pid:
        return Sight(state, pid, restarts, stored, [], "", [])
    uid = re.findall(r"^Uid:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]
    had = capabilities(pid)
    any_of = sorted(set().union(*(had[name] for name in _SETS)))
    return Sight(state, pid, restarts, stored, sorted(bpf_ids(pid, "prog")), uid, any_of)


def killed(signal: str = "KILL") -> Sight:
    """Kill the service like a crash, or let it hang (STOP), and wait until it is running again."""
    old = look()
    subprocess.run(["kill", f"-{signal}", str(old.pid)], check=True)

    def again() -> Sight | None:
        try:
            new = look()
        except (FileNotFoundError, ProcessLookupError):  # it is just ending
            return None
        if new.state == "failed":
            raise RuntimeError(f"{UNIT} has failed:\n{journal()[-8000:]}")
        return new if new.pid not in (0, old.pid) and new.state == "active" else None

    return wait_for("the service to be active again", again)


def refused() -> dict[str, str]:
    """Start the service, which has a reason to refuse, and return how it ended and what it said.

    A unit that systemd is to start again is not in the state `failed`: that one is the end.
    """
    began = time.time()
    subprocess.run(["systemctl", "start", UNIT], capture_output=True, timeout=DEADLINE_S)
    properties = shown("ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts")
    said = journal(began)
    systemctl("reset-failed", UNIT)
    return {**properties, "said": said}


def drop_in(name: str, *settings: str) -> None:
    """Override settings of the unit's [Service]."""
    DROP_INS.mkdir(parents=True, exist_ok=True)
    (DROP_INS / f"{name}.conf").write_text("\n".join(["[Service]", *settings, ""]))
    systemctl("daemon-reload")


def no_drop_ins() -> None:
    shutil.rmtree(DROP_INS)
    systemctl("daemon-reload")


def cgroup(file: str) -> str:
    return Path("/sys/fs/cgroup/system.slice", UNIT, file).read_text()


def wait_for(what: str, condition: Callable[[], T | None]) -> T:
    """Wait until the condition is neither None nor False, and return its value."""
    end = time.monotonic() + DEADLINE_S
    while (value := condition()) is None or value is False:
        if time.monotonic() > end:
            raise TimeoutError(f"timed out waiting for {what}:\n{journal()[-8000:]}")
        time.sleep(0.1)
    return value


def wait_for_end(programs: list[int]) -> None:
    wait_for("the programs to end", lambda: not set(programs) & program_ids())
