"""The truth suite: the socket's owner. See test_truth.py."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.demo.lab import Lab
from producer.events import CAUSES, KNOWN, TRANSMITS, Rows
from producer.host.cgroups import cgroup2_root
from tests.support.capture import DEADLINE_S, Recording, hook_settings, inside, kernel_version, receive, rules, wait_for
from tests.support.comparison import RST, Trial
from tests.support.rules import filtered

pytestmark = pytest.mark.root

_OWNER = """\
import os, socket, sys
open(sys.argv[1], "w").write(str(os.getpid()))
os.setuid(int(sys.argv[2]))
with socket.create_connection((sys.argv[3], int(sys.argv[4]))) as client:
    print(int.from_bytes(client.getsockopt(socket.SOL_SOCKET, 57, 8), "little"), flush=True)
    sys.stdin.readline()
    client.sendall(bytes(101))
    assert client.recv(1) == b""
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    folder = root / f"rebpf-truth-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def creates_cookies(hook: str) -> bool:
    """Whether the hook's programs can create a socket's cookie; the others only read it."""
    return hook == "cgroup_skb" or (hook == "fentry" and kernel_version() >= (5, 12))


def test_a_retransmit_has_the_owner_that_made_the_socket(capture: Recording, lab: Lab, port: int, cgroup: Path) -> None:
    first_syn = f"tcp dport {port} tcp flags & (syn|ack) == syn numgen inc mod 997 == 0 drop"
    program = [sys.executable, "-c", _OWNER, str(cgroup / "cgroup.procs"), "4711", lab.server.ipv4, str(port)]
    with Trial(capture, lab, port) as trial, contextlib.ExitStack() as stack:
        with inside(lab.server):
            server = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
        with rules(lab.server, "prerouting", first_syn):
            argv = lab.client.command(*program)
            child = stack.enter_context(
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert child.stdin is not None
            assert child.stdout is not None
            cookie = int(child.stdout.readline())
        accepted, _ = server.accept()
        with accepted:
            with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
                child.stdin.write("\n")
                child.stdin.flush()
                wait_for(lambda: len(trial.again(lab.client, "rto")) > 0, "a timeout")
            receive(accepted, 101)
        assert child.wait(DEADLINE_S) == 0
    sent, again = trial.sent(lab.client), trial.again(lab.client)
    assert {CAUSES[cause] for cause in again["cause"]} >= {"syn", "rto"}
    for flow in (sent["s"]["flow"], again["s"]["flow"]):
        assert set(flow["uid"]) == {4711}
        assert set(flow["cgroup_id"]) == {cgroup.stat().st_ino}
        assert (flow["flow_known"] & KNOWN["uid"]).all()
        known = (flow["flow_known"] & KNOWN["sk_cookie"]) != 0
        assert set(flow["sk_cookie"][known]) == {cookie}
        assert known.all() or not creates_cookies(trial.hook)
        assert known[-1]


_PROCESS = """\
import socket, sys
with open("/proc/self/comm", "wb") as file:
    file.write(bytes.fromhex(sys.argv[1]))
address, port = sys.argv[3], int(sys.argv[4])
end = socket.create_connection((address, port)) if sys.argv[2] == "client" else socket.create_server((address, port))
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[2] == "server":
    end, _ = end.accept()
end.sendall(bytes(101))
sys.stdin.read()
"""


@contextlib.contextmanager
def process_of(lab: Lab, name: bytes, role: str, port: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a process with this name as one end of a connection; it sends when it gets a line."""
    host = lab.client if role == "client" else lab.server
    argv = host.command(sys.executable, "-c", _PROCESS, name.hex(), role, lab.server.ipv4, str(port))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        yield child


def processes(rows: Rows) -> set[tuple[int, bytes]]:
    """Return the processes of the segments that have a socket; a reset after the end of its process may have none.

    kprobe forgets the process when the socket closes, and the kernel sends the reset after that.
    """
    s = rows["s"]
    of_sockets = s[(s["state"] != 0) & (s["tcp_flags"] & RST == 0)]
    assert (of_sockets["known"] & KNOWN["process"]).all()
    return {(int(row["pid"]), row["comm"].tobytes().partition(b"\0")[0]) for row in of_sockets}


def test_segments_have_the_process_that_connected_or_listened(capture: Recording, lab: Lab, port: int) -> None:
    """In softirqs and timers too, and those of an accepted socket have the listener's."""
    first = f"tcp sport {port} tcp flags & (syn|ack) == syn|ack numgen inc mod 997 == 0 drop"
    with Trial(capture, lab, port, resets=True) as trial, contextlib.ExitStack() as stack:
        server = stack.enter_context(process_of(lab, b"\xff\n%listener", "server", port))
        with rules(lab.client, "prerouting", first):
            client = stack.enter_context(process_of(lab, b"client", "client", port))
        for host, child in ((lab.server, server), (lab.client, client)):
            assert child.stdin is not None
            with rules(lab.server if host is lab.client else lab.client, "prerouting", f"tcp dport {port} drop"):
                child.stdin.write("\n")
                child.stdin.flush()
                if host is lab.client:
                    wait_for(lambda: len(trial.again(lab.client, "rto")) > 0, "a timeout")
    connected, accepted = (client.pid, b"client"), (server.pid, b"\xff\n%listener")
    assert processes(trial.sent(lab.client)) == processes(trial.again(lab.client)) == {connected}
    assert processes(trial.sent(lab.server)) == processes(trial.again(lab.server, "syn_ack")) == {accepted}


def test_segments_of_sockets_older_than_the_programs_have_their_process(lab: Lab, port: int) -> None:
    with process_of(lab, b"listener", "server", port) as server, process_of(lab, b"old", "client", port) as client:
        with Recording(hook_settings(rules=filtered(ports=[port]))) as recording:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
            rows = recording.wait_rows(TRANSMITS, port, 1)
            assert processes(rows[rows["s"]["flow"]["dport"] == port]) == {(client.pid, b"old")}
            with process_of(lab, b"new", "client", port) as new:
                rows = recording.wait_rows(TRANSMITS, port, len(rows) + 3)
        sent = rows[rows["s"]["flow"]["dport"] == port]
        synacks = rows[rows["s"]["tcp_flags"] & 0x12 == 0x12]
        assert processes(sent) == {(client.pid, b"old"), (new.pid, b"new")}
        assert processes(synacks) == {(server.pid, b"listener")}


def unacknowledged(end: socket.socket) -> int:
    """Return how many bytes the peer has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


_WORKER = """\
import os, socket, sys
os.setuid(int(sys.argv[2]))
accepted, _ = socket.socket(fileno=int(sys.argv[1])).accept()
with accepted:
    assert len(accepted.recv(101, socket.MSG_WAITALL)) == 101
    accepted.sendall(bytes(103))
"""


def test_an_accepted_socket_belongs_to_the_user_who_accepted_it(capture: Recording, lab: Lab, port: int) -> None:
    """The kernel acknowledges data before that, for the user of the listener."""
    with Trial(capture, lab, port) as trial, contextlib.ExitStack() as stack:
        with inside(lab.server):
            server = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
        with inside(lab.client):
            client = stack.enter_context(socket.create_connection((lab.server.ipv4, port)))
        client.sendall(bytes(101))
        wait_for(lambda: unacknowledged(client) == 0, "the acknowledgement")
        worker = [sys.executable, "-c", _WORKER, str(server.fileno()), "4712"]
        stack.enter_context(subprocess.Popen(worker, pass_fds=[server.fileno()]))
        receive(client, 103)
        assert client.recv(1) == b""
    sent = trial.sent(lab.server)["s"]
    has_data = sent["payload_len"] > 0
    assert set(sent["flow"]["uid"][has_data]) == {4712}
    assert sent["flow"]["uid"][0] == 0
