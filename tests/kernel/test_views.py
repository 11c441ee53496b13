"""`rebpf top` and `rebpf trace` on real traffic, in terminals, and their ends: nothing stays attached."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fastavro
import pytest

from producer.demo.lab import Lab
from producer.events import RETRANSMITS, STREAMS
from producer.kernel.bpf_syscall import program_ids
from producer.rules.tables import filtered
from tests.support.capture import DEADLINE_S, Recording, hook_settings, inside, rules, wait_for
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import as_nobody, command

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

_PORT = 7411
_PEERS = [f"10.99.0.{number}" for number in range(1, 21)]
_GUILTY = _PEERS[6]
_DROP = f"ip daddr {_GUILTY} tcp dport {_PORT} numgen random mod 100 < 20 drop"


def _serve(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            end, _ = listener.accept()
            threading.Thread(target=_echo, args=(end,), daemon=True).start()


def _echo(end: socket.socket) -> None:
    with end, contextlib.suppress(OSError):
        while end.recv(1 << 16):
            end.sendall(b"!")


def _send(lab: Lab, peer: str, stop: threading.Event) -> None:
    with inside(lab.client):
        end = socket.create_connection((peer, _PORT), timeout=DEADLINE_S)
    with end, contextlib.suppress(OSError):
        while not stop.wait(0.05):
            end.sendall(bytes(5000))
            end.recv(1)


@pytest.fixture(scope="module")
def netns() -> Iterator[int]:
    """The namespace of a client that sends to twenty peers, of which one is behind a lossy path."""
    with Lab(loss=0) as lab, contextlib.ExitStack() as stack:
        for peer in _PEERS:
            subprocess.run(lab.server.command("ip", "address", "add", f"{peer}/32", "dev", "lo"), check=True)
        subprocess.run(lab.client.command("ip", "route", "add", "10.99.0.0/24", "via", lab.server.ipv4), check=True)
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server(("0.0.0.0", _PORT), backlog=64))
        stop = threading.Event()
        threads = [threading.Thread(target=_send, args=(lab, peer, stop)) for peer in _PEERS]
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        stack.enter_context(rules(lab.server, "prerouting", _DROP))
        for thread in threads:
            thread.start()
        yield lab.client.netns
        stop.set()
        for thread in threads:
            thread.join()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


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
        screen = top.wait_for(lambda screen: len(screen) > 3 and screen[3].startswith(f">{_GUILTY}"), "guilty peer")
        assert len(screen) == lines
        assert max(map(len, screen)) <= columns
        programs = attached(top.process.pid)
        assert programs
        top.press("f")
        top.wait_for(lambda screen: f" > {_GUILTY}:{_PORT} " in screen[3], "flows")
        top.press(f"p/ and peer {_PEERS[8]}\r")
        top.wait_for(lambda screen: screen[3].startswith(f">{_PEERS[8]} "), "filter")
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
        time.sleep(0.3)
        top.press("q")
        assert top.wait() == 0


def test_a_closed_terminal_leaves_nothing_attached(netns: int) -> None:
    with PtyCommand(command("top", "netns", netns), 80, 24) as top:
        top.wait_for(lambda screen: len(screen) > 3, "screen")
        programs = attached(top.process.pid)
        top.close()
        top.wait()
        assert programs
        wait_detached(programs)


def test_one_table_for_scripts(netns: int) -> None:
    done = subprocess.run(
        command("top", "--once", "--json", "--window", 5, "netns", netns), capture_output=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout)
    assert found["lines"][0]["name"] == _GUILTY
    assert {line["name"] for line in found["lines"]} == set(_PEERS)
    assert found["lines"][0]["ratio"] > 0.02


def test_a_capture_beside_it_keeps_its_events(netns: int) -> None:
    with Recording(hook_settings(streams=STREAMS, rules=filtered(ports=(_PORT,)))) as capture:
        done = subprocess.run(command("top", "--once", "--window", 3), capture_output=True, timeout=DEADLINE_S)
        assert (done.returncode, done.stderr) == (0, b"")
        wait_for(lambda: len(capture.all(RETRANSMITS)) > 5, "retransmissions")
        for stream in STREAMS:
            wait_for(
                lambda stream=stream: len(capture.all(stream)) == capture.kernel.counters(stream).passed, "all events"
            )
            assert capture.kernel.counters(stream).ring_full == 0


def test_a_trace_ends_with_its_reader(netns: int) -> None:
    with subprocess.Popen(
        command("trace", "netns", netns, "and", "peer", _GUILTY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as trace:
        assert trace.stdout is not None
        assert trace.stdout.readline().startswith("TIME")
        programs = wait_attached(trace.pid)
        assert f"> {_GUILTY}:{_PORT}" in trace.stdout.readline()
        trace.stdout.close()
        assert trace.stderr is not None
        assert trace.stderr.read() == ""
        assert trace.wait(DEADLINE_S) in (0, 141)
    wait_detached(programs)


def test_a_trace_is_written_counted_and_replayed(netns: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    run = command("trace", "-c", "-n", 5, "-w", file, "netns", netns, "and", "peer", _GUILTY)
    live = subprocess.run(run, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (live.returncode, live.stderr) == (0, "")
    lines = live.stdout.splitlines()
    assert lines[6] == "1 flows with retransmissions or errors"
    assert lines[8].endswith(f"> {_GUILTY}:{_PORT}")
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
    assert "need root" in done.stderr
