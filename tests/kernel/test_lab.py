"""The lab: real namespaces, real loss, counters that start at 0, and nothing left behind, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from producer.demo.lab import Host, Lab
from producer.errors import UnavailableError
from producer.host.tcp_counters import parse_counters
from tests.support.capture import DEADLINE_S, wait_for

pytestmark = pytest.mark.root


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def wait_until_gone(pids: list[int]) -> None:
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), f"the end of {pids}")


def namespace(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def wait_for_processes(namespaces: set[str], count: int) -> list[int]:
    def inside() -> list[int] | None:
        found = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and namespace(pid) in namespaces]
        return found if len(found) == count else None

    return wait_for(inside, f"{count} processes in the namespaces")


def connect(lab: Lab, address: str, count: int) -> None:
    """Open connections to the lab's echo server, each with one exchange and an orderly end."""
    program = (
        "import socket, sys\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    with socket.create_connection((sys.argv[1], 5002)) as s:\n"
        "        s.sendall(b'x')\n"
        "        assert s.recv(1) == b'x'\n"
        "        s.shutdown(socket.SHUT_WR)\n"
        "        assert s.recv(1) == b''\n"
    )
    subprocess.run(lab.client.command(sys.executable, "-c", program, address, str(count)), check=True)


def test_counters_are_read_by_the_kernels_names() -> None:
    text = "Ip: A B\nIp: 7 8\nTcp: RtoMin MaxConn OutSegs\nTcp: 200 -1 11\nTcpExt: TCPTimeouts\nTcpExt: 13\n"
    assert parse_counters(text) == {"RtoMin": 200, "MaxConn": -1, "OutSegs": 11, "TCPTimeouts": 13}


def test_counters_start_at_zero_and_count_the_labs_traffic_alone() -> None:
    with Lab(loss=0) as lab:
        assert [lab.counters()[name] for name in ("OutSegs", "RetransSegs", "ActiveOpens")] == [0, 0, 0]
        connect(lab, lab.server.ipv4, 17)
        connect(lab, lab.server.ipv6, 13)
        assert lab.client.counters()["ActiveOpens"] == 30
        assert lab.server.counters()["PassiveOpens"] == 30


def test_loss_makes_retransmits_on_both_sides_and_no_failed_sends() -> None:
    with Lab(loss=0.05) as lab:
        sent = lab.traffic(3)
        assert lab.wait_idle(DEADLINE_S)
        counters = lab.counters()
        assert all(host.counters()["RetransSegs"] > 0 for host in lab.hosts)
    assert sent.connections > 4, "short ones beside the long ones"
    assert sent.failed == 0
    assert sent.payload_bytes > 0
    assert counters["TCPFastRetrans"] > 0
    assert counters["TCPSynRetrans"] > 0
    assert counters["TCPRetransFail"] == 0


def test_stop_ends_the_traffic_early() -> None:
    stop = threading.Event()
    stop.set()
    with Lab(loss=0) as lab:
        # Otherwise an hour, far above the test's timeout.
        assert lab.traffic(3600, stop).failed == 0


def test_hosts_are_in_namespaces_of_their_own() -> None:
    with Lab() as lab:
        assert len({os.stat("/proc/self/ns/net").st_ino, *(host.netns for host in lab.hosts)}) == 3


def test_leaving_removes_everything_also_after_an_error() -> None:
    before = interfaces()
    hosts: tuple[Host, ...] = ()
    with contextlib.suppress(ZeroDivisionError), Lab() as lab:
        hosts = lab.hosts
        raise ZeroDivisionError
    assert len(hosts) == 2
    assert [Path(f"/proc/{host.pid}").exists() for host in hosts] == [False, False]
    assert interfaces() == before


def test_a_killed_process_leaves_nothing() -> None:
    program = (
        "from producer.demo.lab import Lab\n"
        "with Lab() as lab:\n"
        "    print(*(host.pid for host in lab.hosts), flush=True)\n"
        "    lab.traffic(3600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(word) for word in child.stdout.readline().split()]
    assert len(pids) == 2
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    # The two that hold the namespaces, the server, and the generator.
    inside = wait_for_processes(namespaces, 4)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    wait_until_gone(inside)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in ("unshare", "nsenter", "sh", "cat"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"ip link add.*iproute2"), Lab():
        pass
