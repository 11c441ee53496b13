"""The records of connections: one closing record for each, sums equal to the kernel's counters, and its process."""

import contextlib
import errno
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import FLOWS, KNOWN, REASONS, ROLES, STATES, STREAMS, Rows
from tests.support.capture import (
    DEADLINE_S,
    Pair,
    Recording,
    cookie_of,
    disconnect,
    hook_settings,
    inside,
    rules,
    wait_for,
)
from tests.support.rules import filtered

pytestmark = pytest.mark.root

_TCP_SYNCNT = 7
_ENDS = """\
import os, socket, sys, threading
with open("/proc/self/comm", "wb") as file:
    file.write(bytes.fromhex(sys.argv[1]))
address, port, role = sys.argv[2], int(sys.argv[3]), sys.argv[4]
ends = []
def connect():
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
        file.write("a thread")
    ends.append(socket.create_connection((address, port)))
if role == "client":
    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
else:
    ends.append(socket.create_server((address, port)))
print("ready", flush=True)
sys.stdin.read()
"""


def of_hosts(recording: Recording, hosts: Sequence[Host], reason: str = "close") -> Rows:
    """Return the records of the connections of these hosts."""
    rows = recording.all(FLOWS)
    namespaces = [host.netns for host in hosts]
    chosen: Rows = rows[np.isin(rows["flow"]["netns"], namespaces) & (rows["reason"] == REASONS.index(reason))]
    return chosen


def of_port(recording: Recording, port: int, reason: str = "close") -> Rows:
    rows = recording.of_port(FLOWS, port)
    chosen: Rows = rows[rows["reason"] == REASONS.index(reason)]
    return chosen


def closed(recording: Recording, port: int, count: int) -> Rows:
    """Wait for the closing records of a port."""

    def condition() -> Rows | None:
        rows = of_port(recording, port)
        return rows if len(rows) >= count else None

    rows = wait_for(condition, f"{count} closing records")
    assert len(rows) == count
    return rows


def by_role(rows: Rows, role: str) -> Rows:
    chosen: Rows = rows[rows["role"] == ROLES.index(role)]
    return chosen


def known(row: np.void, name: str) -> bool:
    return bool(row["known"] & KNOWN[name])


def total(rows: Rows, *names: str) -> int:
    return sum(int(rows[name].sum()) for name in names)


def comm(row: np.void) -> bytes:
    return row["comm"].tobytes().partition(b"\0")[0]


def unrecorded(rows: Rows, hosts: Sequence[Host]) -> int:
    """Return how many ends of connections have no record, if all were established and are closed. None has two.

    PassiveOpens also counts the socket that is dropped when two CPUs create one for the same handshake. So a server has
    as many connections as its clients have opened.
    """
    opened = sum(host.counters()["ActiveOpens"] for host in hosts)
    for host in hosts:
        mine = rows[rows["flow"]["netns"] == host.netns]
        assert len(np.unique(mine["flow"]["sk_cookie"])) == len(mine), "one closing record for each socket"
        assert len(by_role(mine, "client")) <= host.counters()["ActiveOpens"]
        assert len(by_role(mine, "server")) <= host.counters()["PassiveOpens"]
    assert len(by_role(rows, "unknown")) == 0
    assert len(by_role(rows, "server")) <= opened
    return 2 * opened - len(rows)


def assert_equal_to_counters(rows: Rows, host: Host) -> None:
    """Compare the sums with the counters of a namespace all of whose connections are closed and have a record."""
    mine, counters = rows[rows["flow"]["netns"] == host.netns], host.counters()
    assert total(mine, "total_retrans") == counters["RetransSegs"]
    parts = {
        "TCPFastRetrans": ("retrans_fast",),
        "TCPSlowStartRetrans": ("retrans_slow_start",),
        "TCPSynRetrans": ("retrans_syn", "retrans_syn_ack"),
    }
    kernel = {name: counters[name] for name in parts}
    kernel["rest"] = counters["RetransSegs"] - sum(kernel.values())
    parts["rest"] = ("retrans_rto", "retrans_tlp")
    unseen = {name: kernel[name] - total(mine, *causes) for name, causes in parts.items()}
    assert min(unseen.values()) >= 0, unseen
    assert sum(unseen.values()) == total(mine, "retrans_other"), "no program ran for these: docs/truth.md"


def lossy_round() -> bool:
    """Compare the records of a lossy link's traffic with its counters, unless a connection has none."""
    with Lab(loss=0.05) as lab:
        settings = hook_settings(streams=STREAMS, rules=filtered(addresses=map(ip_address, lab.addresses)))
        with Recording(settings) as recording:
            sent = lab.traffic(6)
            assert lab.wait_idle(DEADLINE_S)
            rows = of_hosts(recording, lab.hosts)
            assert recording.kernel.counters(FLOWS).ring_full == 0
            if sent.failed or unrecorded(rows, lab.hosts):
                return False
            for host in lab.hosts:
                assert_equal_to_counters(rows, host)
            assert total(rows, "retrans_fast") > 0
            assert total(rows, "retrans_syn") > 0
            assert total(rows, "retrans_syn_ack") > 0
            return True


def test_sums_over_a_lossy_link_equal_the_kernels_counters() -> None:
    """Some hosts run no tracepoint's program in softirqs that interrupt process 1: docs/truth.md. So try again."""
    assert any(lossy_round() for _ in range(8))


def test_tcp_fast_opens_syn_acks_are_of_the_connection(flows: Recording, port: int) -> None:
    first = f"tcp sport {port} tcp flags & (syn|ack) == syn|ack numgen inc mod 997 == 0 drop"
    with Lab(loss=0) as lab, contextlib.ExitStack() as stack:
        for host, without_cookie in ((lab.client, 0x5), (lab.server, 0x202)):
            subprocess.run(host.command("sysctl", "-qw", f"net.ipv4.tcp_fastopen={without_cookie}"), check=True)
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 100)
        with inside(lab.client):
            client = stack.enter_context(socket.socket())
        with rules(lab.client, "prerouting", first):
            client.sendto(b"hello", socket.MSG_FASTOPEN, (lab.server.ipv4, port))
            accepted = stack.enter_context(listener.accept()[0])
            assert accepted.recv(5) == b"hello"
            accepted.sendall(b"!")
            assert client.recv(1) == b"!"
        client.close()
        assert accepted.recv(1) == b""
        accepted.close()
        rows = closed(flows, port, 2)
        assert unrecorded(rows, lab.hosts) == 0
        for host in lab.hosts:
            assert_equal_to_counters(rows, host)
        (server,) = by_role(rows, "server")
        assert server["retrans_syn_ack"] >= 1
        assert server["bytes_received"] == 5 + 1


def test_segments_and_bytes_equal_what_was_sent(flows: Recording, port: int) -> None:
    with Lab(loss=0) as lab:
        for _ in range(101):
            with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
                pair.exchange(3, 211)
                pair.end()
        assert lab.wait_idle(DEADLINE_S)
        rows = closed(flows, port, 202)
        client, server = by_role(rows, "client"), by_role(rows, "server")
        assert len(client) == len(server) == 101
        assert set(client["bytes_sent"]) == {3 * 211}
        assert set(server["bytes_sent"]) == {3}
        assert set(server["bytes_received"]) == {3 * 211 + 1}, "the FIN counts"
        assert set(client["bytes_received"]) == {3 + 1}
        assert set(client["bytes_acked"]) == {3 * 211 + 2}, "the SYN and the FIN count"
        assert total(client, "segs_out") == lab.client.counters()["OutSegs"]
        # The SYN-ACK is sent before the connection has a socket.
        assert total(server, "segs_out") + 101 == lab.server.counters()["OutSegs"]
        assert total(client, "segs_in") == lab.client.counters()["InSegs"]
        assert total(rows, "total_retrans") == 0


def test_a_refused_connect_has_its_error(flows: Recording, lab: Lab, port: int) -> None:
    with inside(lab.client), pytest.raises(ConnectionRefusedError):
        socket.create_connection((lab.server.ipv4, port))
    (row,) = closed(flows, port, 1)
    assert (ROLES[row["role"]], STATES[row["state"]]) == ("client", "SYN_SENT")
    assert (known(row, "error"), row["error"]) == (True, errno.ECONNREFUSED)
    assert (row["flow"]["dport"], row["flow"]["netns"]) == (port, lab.client.netns)
    assert not known(row, "connect_us")


def test_a_connect_that_times_out_has_its_error_and_its_syns(flows: Recording, lab: Lab, port: int) -> None:
    """All of it happens in timers, which may interrupt process 1, so try again: see above."""
    for _ in range(6):
        with inside(lab.client), rules(lab.server, "prerouting", f"tcp dport {port} drop"), socket.socket() as client:
            client.setsockopt(socket.IPPROTO_TCP, _TCP_SYNCNT, 1)
            with pytest.raises(TimeoutError):
                client.connect((lab.server.ipv4, port))
        rows = of_port(flows, port)
        if len(rows) and not rows[-1]["retrans_other"]:
            break
    row = rows[-1]
    assert (STATES[row["state"]], row["error"]) == ("SYN_SENT", errno.ETIMEDOUT)
    assert row["retrans_syn"] == row["total_retrans"] == row["segs_out"] - 1 > 0


def test_an_unreachable_peer_has_its_error(flows: Recording, lab: Lab, port: int) -> None:
    reject = f"tcp dport {port} reject with icmp host-unreachable"
    with inside(lab.client), rules(lab.server, "input", reject), pytest.raises(OSError, match="No route"):
        socket.create_connection((lab.server.ipv4, port))
    (row,) = closed(flows, port, 1)
    assert (STATES[row["state"]], row["error"]) == ("SYN_SENT", errno.EHOSTUNREACH)


def test_a_connect_that_the_process_gives_up_has_no_error(flows: Recording, lab: Lab, port: int) -> None:
    with inside(lab.client), rules(lab.server, "prerouting", f"tcp dport {port} drop"), socket.socket() as client:
        client.setblocking(False)
        assert client.connect_ex((lab.server.ipv4, port)) == errno.EINPROGRESS
    (row,) = closed(flows, port, 1)
    assert (STATES[row["state"]], known(row, "error")) == ("SYN_SENT", False)


def test_a_reset_is_the_error_of_the_end_that_gets_it(flows: Recording, lab: Lab, port: int) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pair.client.close()
        rows = closed(flows, port, 2)
    (client,), (server,) = by_role(rows, "client"), by_role(rows, "server")
    assert (STATES[server["state"]], server["error"]) == ("ESTABLISHED", errno.ECONNRESET)
    assert (STATES[client["state"]], known(client, "error")) == ("ESTABLISHED", False)
    assert known(client, "connect_us")
    assert not known(server, "connect_us")


@contextlib.contextmanager
def end_of(host: Host, name: bytes, address: str, port: int, role: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a process with the name `name` that connects, in a thread with another name, or listens, while this lasts."""
    argv = host.command(sys.executable, "-c", _ENDS, name.hex(), address, str(port), role)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child


def test_both_ends_have_the_process_that_connected_or_listened(flows: Recording, lab: Lab, port: int) -> None:
    address = lab.server.ipv4
    with (
        end_of(lab.server, b"\xff\n%listener", address, port, "server") as server,
        end_of(lab.client, b"client", address, port, "client") as client,
    ):
        pass
    rows = closed(flows, port, 2)
    (connected,), (accepted,) = by_role(rows, "client"), by_role(rows, "server")
    assert (connected["pid"], comm(connected)) == (client.pid, b"client")
    assert (accepted["pid"], comm(accepted)) == (server.pid, b"\xff\n%listener")
    assert known(connected, "process")
    assert known(accepted, "process")


def test_connections_older_than_the_programs_have_their_process(lab: Lab, port: int) -> None:
    address = lab.server.ipv4
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(end_of(lab.server, b"listener", address, port, "server"))
        old = stack.enter_context(end_of(lab.client, b"old", address, port, "client"))
        recording = stack.enter_context(Recording(hook_settings(streams=STREAMS)))
        recording.kernel.report_flows()
        (row,) = of_port(recording, port, "interval")
        assert (row["pid"], comm(row)) == (old.pid, b"old")
        assert not known(row, "start_ns")
        assert not known(row, "role")
        with end_of(lab.client, b"new", address, port, "client") as new:
            pass
        wait_for(lambda: len(of_port(recording, port)) or None, "the client's closing record")
        (row,) = by_role(of_port(recording, port), "client")
        assert (row["pid"], comm(row)) == (new.pid, b"new")
        assert server.stdin is not None
        server.stdin.close()
        rows = wait_for(
            lambda: rows if len(rows := by_role(of_port(recording, port), "server")) else None, "the server's record"
        )
        assert {(row["pid"], comm(row)) for row in rows} == {(server.pid, b"listener")}


def test_an_open_connection_is_reported_on_demand_and_no_longer_once_it_is_closed(
    flows: Recording, lab: Lab, port: int
) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        cookies = {cookie_of(pair.client), cookie_of(pair.accepted)}
        pair.exchange(7, 211)
        flows.kernel.report_flows()
        first = of_port(flows, port, "interval")
        pair.exchange(4, 211)
        flows.kernel.report_flows()
        second = of_port(flows, port, "interval")[len(first) :]
        pair.end()
    closed(flows, port, 2)
    flows.kernel.report_flows()
    assert len(of_port(flows, port, "interval")) == 4
    assert set(first["flow"]["sk_cookie"]) == set(second["flow"]["sk_cookie"]) == cookies
    assert set(by_role(first, "client")["bytes_sent"]) == {7 * 211}
    assert set(by_role(second, "client")["bytes_sent"]) == {11 * 211}
    assert {STATES[state] for state in first["state"]} == {"ESTABLISHED"}


def test_a_connection_that_several_processes_have_open_is_reported_once(flows: Recording, lab: Lab, port: int) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        ends = [pair.client.fileno(), pair.accepted.fileno()]
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=ends) as other:
            flows.kernel.report_flows()
            assert other.poll() is None
            rows = of_port(flows, port, "interval")
        pair.end()
    assert sorted(rows["flow"]["sk_cookie"]) == sorted(set(rows["flow"]["sk_cookie"]))
    assert len(rows) == 2
    closed(flows, port, 2)


def test_ipv6_has_the_same_record(flows: Recording, lab: Lab, port: int) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv6, port) as pair:
        pair.end()
    rows = closed(flows, port, 2)
    (client,), (server,) = by_role(rows, "client"), by_role(rows, "server")
    address = socket.inet_pton(socket.AF_INET6, lab.server.ipv6)
    assert client["flow"]["daddr"].tobytes() == server["flow"]["saddr"].tobytes() == address
    assert client["flow"]["sport"] == server["flow"]["dport"]


def test_a_socket_that_connects_again_has_a_record_for_each_connection(flows: Recording, lab: Lab, port: int) -> None:
    with contextlib.ExitStack() as stack:
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
        with inside(lab.client):
            client = stack.enter_context(socket.socket())
        for size in (211, 307):
            client.connect((lab.server.ipv4, port))
            accepted, _ = listener.accept()
            client.sendall(bytes(size))
            assert len(accepted.recv(size, socket.MSG_WAITALL)) == size
            accepted.close()
            assert client.recv(1) == b""
            disconnect(client)
    rows = by_role(closed(flows, port, 4), "client")
    assert list(rows["bytes_sent"]) == [211, 307]
    assert rows["start_ns"][0] < rows["start_ns"][1]
    assert len(set(rows["flow"]["sk_cookie"])) == 1


def test_dropped_and_own_connections_have_no_record(lab: Lab, port: int) -> None:
    settings = hook_settings(streams=STREAMS, rules=filtered(ports=[port]))
    with Recording(settings) as recording:
        with inside(lab.client), socket.create_server((lab.client.ipv4, port)) as listener:
            with socket.socket() as own:
                recording.kernel.exclude_socket(own.fileno())
                own.connect((lab.client.ipv4, port))
                listener.accept()[0].close()
            with socket.create_connection((lab.client.ipv4, port)) as foreign:
                cookies = {cookie_of(foreign)}
                accepted, _ = listener.accept()
                cookies.add(cookie_of(accepted))
                recording.kernel.report_flows()
                accepted.close()
        rows = closed(recording, port, 2)
        assert set(rows["flow"]["sk_cookie"]) == cookies
        assert set(recording.all(FLOWS)["flow"]["sk_cookie"]) == cookies
