"""`rebpf top` and `rebpf trace` on real traffic, in terminals, and their ends: nothing stays attached."""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fastavro
import pytest

from producer.events import RETRANSMITS, STREAMS
from tests.support.capture import DEADLINE_S, Recording, hook_settings, wait_for
from tests.support.programs import program_ids
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import as_nobody, command
from tests.support.rules import filtered
from tests.support.twenty_peers import GUILTY, PEERS, PORT, twenty_peers

pytestmark = pytest.mark.root

NO_ERROR = re.compile(r"(.* WARNING trace: events are missing lost=\d+\n)?")
"""The kernel skips raw_tp's program in an interrupt of another one (docs/truth.md), which a busy machine shows."""


@pytest.fixture(scope="module")
def netns() -> Iterator[int]:
    """The namespace of a client that sends to twenty peers, of which one is behind a lossy path."""
    with twenty_peers() as client:
        yield client.netns


def attached(pid: int) -> set[int]:
    """Return the programs of a process's links."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
            if "link_type" in fields:
                found.add(int(fields["prog_id"]))
    return found


def wait_attached(pid: int) -> set[int]:
    return wait_for(lambda: attached(pid) or None, "links")


def wait_detached(programs: set[int]) -> None:
    wait_for(lambda: not programs & program_ids(), "the programs' end")


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])
def test_the_guilty_peer_is_on_the_first_line(netns: int, columns: int, lines: int) -> None:
    with PtyCommand(command("top", "netns", netns), columns, lines) as top:
        screen = top.wait_for(lambda screen: len(screen) > 3 and screen[3].startswith(f">{GUILTY}"), "guilty peer")
        assert len(screen) == lines
        assert max(map(len, screen)) <= columns
        programs = attached(top.process.pid)
        assert programs
        top.press("f")
        top.wait_for(lambda screen: f" > {GUILTY}:{PORT} " in screen[3], "flows")
        top.press(f"p/ and peer {PEERS[8]}\r")
        top.wait_for(lambda screen: screen[3].startswith(f">{PEERS[8]} "), "filter")
        top.press("\x03")
        assert top.wait() == 0
        assert "Traceback" not in top.output
        assert top.output.rstrip().endswith("\x1b[?1049l")
        wait_detached(programs)


def test_a_wrong_filter_is_shown_under_its_place(netns: int) -> None:
    with PtyCommand(command("top", "netns", netns), 80, 24, NO_COLOR="1") as top:
        top.wait_for(lambda screen: len(screen) > 3 and "10.99" in screen[3], "peers")
        top.press("/\x15port x\r")
        screen = top.wait_for(lambda screen: "expected a port" in screen[-1], "error")
        assert screen[-3:-1] == ["/port x", "      ^"]
        assert "\x1b[1;31m" not in top.output
        top.press("\x1b")
        # Escape and q in one read would be another key.
        top.wait_for(lambda screen: "/port x" not in screen, "the end of the input")
        top.press("q")
        assert top.wait() == 0


@pytest.mark.parametrize("words", [["top"], ["trace"], ["run", "--state-dir", "{folder}"]], ids=lambda words: words[0])
def test_a_closed_terminal_leaves_nothing_attached(words: list[str], tmp_path: Path) -> None:
    with PtyCommand(command(*(word.format(folder=tmp_path) for word in words)), 80, 24) as shown:
        programs = wait_attached(shown.process.pid)
        shown.close()
        shown.wait()
        wait_detached(programs)


def test_a_terminal_that_closes_while_the_programs_are_compiled_ends_a_run(tmp_path: Path) -> None:
    with PtyCommand(command("run", "--state-dir", tmp_path), 80, 24) as run:
        while "compiling" not in run.output:
            run.read(0.1)
        run.close()
        run.wait()
        assert not (tmp_path / "agent.json").exists()


def test_one_table_for_scripts(netns: int) -> None:
    done = subprocess.run(
        command("top", "--once", "--json", "--window", 5, "netns", netns), capture_output=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout)
    assert found["lines"][0]["name"] == GUILTY
    assert {line["name"] for line in found["lines"]} == set(PEERS)
    assert found["lines"][0]["ratio"] > 0.02


def test_a_capture_beside_it_keeps_its_events(netns: int) -> None:
    with Recording(hook_settings(streams=STREAMS, rules=filtered(ports=(PORT,)))) as capture:
        done = subprocess.run(command("top", "--once", "--window", 3), capture_output=True, timeout=DEADLINE_S)
        assert (done.returncode, done.stderr) == (0, b"")
        wait_for(lambda: len(capture.all(RETRANSMITS)) > 5, "retransmissions")
        for stream in STREAMS:
            wait_for(
                lambda stream=stream: len(capture.all(stream)) == capture.kernel.counters(stream).passed, "all events"
            )
            assert capture.kernel.counters(stream).ring_full == 0


def test_a_trace_ends_with_its_reader_though_no_event_comes() -> None:
    with subprocess.Popen(command("trace", "cause rto and netns 1"), stdout=subprocess.PIPE) as trace:
        assert trace.stdout is not None
        assert trace.stdout.readline().startswith(b"TIME")
        programs = wait_attached(trace.pid)
        trace.stdout.close()
        assert trace.wait(DEADLINE_S) == 0
    wait_detached(programs)


def test_a_trace_ends_with_its_reader(netns: int) -> None:
    with subprocess.Popen(
        command("trace", "netns", netns, "and", "peer", GUILTY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as trace:
        assert trace.stdout is not None
        assert trace.stdout.readline().startswith("TIME")
        programs = wait_attached(trace.pid)
        assert f"> {GUILTY}:{PORT}" in trace.stdout.readline()
        trace.stdout.close()
        assert trace.stderr is not None
        assert NO_ERROR.fullmatch(trace.stderr.read())
        assert trace.wait(DEADLINE_S) in (0, 141)
    wait_detached(programs)


def test_a_trace_is_written_counted_and_replayed(netns: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    run = command("trace", "-c", "-n", 5, "-w", file, "netns", netns, "and", "peer", GUILTY)
    live = subprocess.run(run, capture_output=True, text=True, timeout=DEADLINE_S)
    assert live.returncode == 0
    assert NO_ERROR.fullmatch(live.stderr)
    lines = live.stdout.splitlines()
    assert lines[6] == "1 flow with retransmissions or an error"
    assert lines[8].endswith(f"> {GUILTY}:{PORT}")
    with file.open("rb") as opened:
        records = [*fastavro.reader(opened)]
    assert len([record for record in records if "cause" in record]) >= 5
    again = subprocess.run(command("trace", "-r", file, "-n", 5), capture_output=True, text=True, timeout=DEADLINE_S)
    assert [line.split()[:2] for line in again.stdout.splitlines()] == [line.split()[:2] for line in lines[:6]]


def test_a_full_disk_ends_a_trace_with_one_line(netns: int) -> None:
    done = subprocess.run(
        command("trace", "-w", "/dev/full", "netns", netns), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 74
    assert done.stderr == "rebpf: /dev/full: No space left on device\n"


def test_a_killed_trace_leaves_nothing_attached(netns: int) -> None:
    with subprocess.Popen(command("trace", "netns", netns), stdout=subprocess.DEVNULL) as trace:
        programs = wait_attached(trace.pid)
        trace.send_signal(signal.SIGKILL)
    wait_detached(programs)


def test_ctrl_c_while_the_programs_are_loaded_is_quiet(netns: int) -> None:
    with PtyCommand(command("trace", "netns", netns), 80, 24) as trace:
        while "TIME" not in trace.output:
            trace.read(0.1)
        trace.press("\x03")
        assert trace.wait() == 0
        assert "Traceback" not in trace.output
        assert "loader" not in trace.output


def test_views_need_root(netns: int) -> None:
    done = subprocess.run(
        [*as_nobody(), *command("trace")], capture_output=True, text=True, timeout=DEADLINE_S, env={**os.environ}
    )
    assert done.returncode == 77
    assert "needs root" in done.stderr
