"""`rebpf demo` as a user runs it: its numbers match the kernel's, and nothing is left, however it ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from producer.demo.demo import demo
from producer.errors import PermissionDenied
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import wait_until

pytestmark = pytest.mark.root

START_TIMEOUT_S = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The parent of the demo's temporary folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


def start(folder: Path, *options: str, columns: int = 200) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "producer", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": str(columns)},
    )


def descendants(pid: int) -> dict[int, str]:
    """Return the descendants of `pid` with their start times, so that a reused pid is not mistaken for one."""
    found: dict[int, str] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found |= {child: start_time(child), **descendants(child)}
    return found


def start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def wait_until_gone(processes: dict[int, str]) -> None:
    wait_until("their end", lambda: not [pid for pid, started in processes.items() if start_time(pid) == started])


def read_until(lines: Iterator[str], text: str) -> str:
    seen = []
    for line in lines:
        seen.append(line)
        if text in line:
            return line
    pytest.fail(f"{text!r} was not printed: {''.join(seen)}")


def is_explained(row: dict[str, Any], reasons: list[str]) -> bool:
    return row["difference"] == 0 or (row["difference"] < 0 and bool(reasons))


def test_the_events_agree_with_the_kernels_counters(folder: Path) -> None:
    process = start(folder, "--duration", "7", "--loss", "0.02", "--json")
    out, err = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, err
    result = json.loads(out)
    rows = {row["what"].strip(): row for row in result["rows"]}
    assert rows["retransmitted"]["counted"] > 0
    # The transmit topic's marks, which no tracepoint gave, are exactly the kernel's retransmits.
    assert rows["marked as retransmitted"]["difference"] == 0
    assert [what for what, row in rows.items() if not is_explained(row, result["reasons"])] == []
    assert rows["retransmitted"]["seen"] > 0.9 * rows["retransmitted"]["counted"]
    assert rows["first transmissions"]["seen"] > 0.98 * rows["first transmissions"]["counted"]
    assert (result["repeated"], result["missing"]) == (0, 0)
    assert result["read"] == {topic: account["delivered"] for topic, account in result["balance"].items()}
    assert list(folder.iterdir()) == []


def test_the_results_fit_one_screen_and_say_who_lost_where_and_why(folder: Path) -> None:
    process = start(folder, "--duration", "5", "--loss", "0.05", columns=80)
    out, err = process.communicate(timeout=START_TIMEOUT_S)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    results = lines[next(number for number, line in enumerate(lines) if "were retransmitted" in line) :]
    assert len(results) <= 23  # and the prompt
    (worst,) = [line for line in results if re.search(r"^\S+ > \S+ +5001 +\d+ +\d\.\d% +fast \d+", line)][:1]
    assert re.search(r" > 10\.111\.\S+ | > fd6f:\S+ ", worst)
    assert any("RetransSegs" in line for line in results)


def test_a_terminal_shows_the_live_table_and_then_the_results(folder: Path) -> None:
    run = [sys.executable, "-m", "producer", "demo", "--duration", "6", "--loss", "0.05"]
    with PtyCommand(run, 80, 24, TMPDIR=str(folder)) as demo_:
        screen = demo_.wait_for(lambda screen: any(" fast " in line for line in screen[3:]), "retransmissions")
        assert (len(screen), screen[2].split()[:2]) == (24, ["PEER", "RETR/S"])
        assert max(map(len, screen)) <= 80
        assert "kernel RetransSegs" in screen[1]
        assert screen[-1].endswith("then the summary beside the kernel's counters")
        assert demo_.wait() == 0
        results = demo_.output.rpartition("\x1b[?1049l")[2]
        assert "were retransmitted" in results
        assert "RetransSegs" in results
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("said", ["Loading the hooks", "PEER"], ids=["start", "traffic"])
def test_a_closed_terminal_leaves_nothing(folder: Path, said: str) -> None:
    with PtyCommand([sys.executable, "-m", "producer", "demo"], 80, 24, TMPDIR=str(folder)) as demo_:
        while said not in demo_.output:
            demo_.read(0.1)
        processes = descendants(demo_.process.pid)
        demo_.close()
        demo_.wait()
    wait_until_gone(processes)
    assert list(folder.iterdir()) == []


def test_the_events_are_shown_on_demand_and_the_broker_is_for_trying(folder: Path) -> None:
    process = start(folder, "--duration", "3", "--loss", "0.05", "--events")
    out, err = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, err
    assert "not for production" in out
    assert re.search(r"^\d\d:\d\d:\d\d\.\d{3} sent .* \S+ > \S+$", out, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d\.\d{3} (fast|syn|rto|tlp)\b", out, re.MULTILINE)
    assert "RetransSegs" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_table_and_nothing_left(folder: Path, number: signal.Signals) -> None:
    process = start(folder, "--duration", "3600", "--events")
    assert process.stdout is not None
    lines = iter(process.stdout)
    read_until(lines, " sent ")
    below = descendants(process.pid)
    assert len(below) >= 5  # two namespaces, both ends of the traffic, the producer
    process.send_signal(number)
    read_until(lines, "RetransSegs")
    process.communicate(timeout=60)
    assert process.returncode == 0
    wait_until_gone(below)
    assert list(folder.iterdir()) == []


def test_a_signal_before_it_is_ready_ends_it(folder: Path) -> None:
    process = start(folder, "--duration", "3600")
    assert process.stdout is not None
    read_until(iter(process.stdout), "namespaces")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert list(folder.iterdir()) == []


def test_a_kill_leaves_no_process(folder: Path) -> None:
    process = start(folder, "--duration", "3600", "--events")
    assert process.stdout is not None
    read_until(iter(process.stdout), " sent ")
    below = descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(below)


def test_an_end_of_the_producer_is_an_error(folder: Path) -> None:
    process = start(folder, "--duration", "3600", "--events")
    assert process.stdout is not None
    read_until(iter(process.stdout), " sent ")
    (producer,) = [
        pid for pid in descendants(process.pid) if b"--state-dir" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(producer, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 69
    assert "the producer ended" in err


def test_without_root_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionDenied, match="root"):
        demo(duration_s=1.0, loss=0.0, as_json=True, show_events=False)
