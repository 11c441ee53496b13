"""A server process ends when asked, when its tests are killed, and explains a failed start."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.procfs import ends
from tests.support.servers import process
from tests.support.servers.process import free_port
from tests.support.servers.shell import ShellServer

ROOT = Path(__file__).parents[3]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_server_dies_with_a_killed_test_process(tmp_path):
    code = (
        "import pathlib, signal, sys\n"
        "from tests.support.servers.shell import ShellServer\n"
        "server = ShellServer(pathlib.Path(sys.argv[1]), 'touch ready; exec sleep 600')\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            assert ends(server)
        finally:
            os.close(server)


def test_stop_ends_a_paused_server_in_good_order(tmp_path):
    server = ShellServer(tmp_path, "trap 'touch ended; exit' TERM; touch ready; while :; do sleep 0.1; done")
    server.start()
    server.pause()

    server.stop()

    assert (tmp_path / "ended").exists()


def test_stop_uses_force_where_the_server_does_not_listen(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "STOP_DEADLINE_S", 0.3)
    server = ShellServer(tmp_path, "trap '' TERM; touch ready; while :; do sleep 0.1; done")
    server.start()
    running = os.pidfd_open(server.pid)
    try:
        server.stop()
        assert ends(running)
    finally:
        os.close(running)


def test_pause_and_resume_stop_the_process_and_let_it_go_on(tmp_path):
    with ShellServer(tmp_path, "touch ready; exec sleep 600") as server:
        server.pause()
        os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
        assert state_of(server.pid) == "T"

        server.resume()
        os.waitid(os.P_PID, server.pid, os.WCONTINUED | os.WNOWAIT)
        assert state_of(server.pid) in "SR"


def test_a_failed_start_shows_the_end_of_the_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*no such disk"):
        ShellServer(tmp_path, "echo no such disk >&2; exit 3").start()


def test_a_start_that_takes_too_long_leaves_nothing_running(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "START_DEADLINE_S", 0.3)
    server = ShellServer(tmp_path, "exec sleep 600")
    server.launch()
    pid = server.pid

    with pytest.raises(TimeoutError):
        server.wait_until_ready()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_a_free_port_is_bindable_and_no_ephemeral_one():
    port = free_port()
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    assert port < first_ephemeral
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_free_port_is_given_to_one_process_until_that_ends():
    code = "from tests.support.servers.process import free_port; print(free_port(), flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        port = int(other.stdout.readline())
        assert not process.claim(port)
        other.stdin.write("\n")
    assert process.claim(port)
    assert not process.claim(port)
