"""The transmit stream: each segment once, and each field with the sender's value."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import HOOKS, KNOWN, STATES, TRANSMITS, Rows
from producer.host.cgroups import cgroup2_root
from producer.kernel.bpf_syscall import jiffies_per_second
from tests.support.capture import DEADLINE_S, Pair, Recording, cookie_of, inside, sees_ipv6_synacks, wait_for

pytestmark = pytest.mark.root

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


@pytest.fixture(scope="module")
def lab(root: None) -> Iterator[Lab]:
    """Namespaces without other modules' connections, whose last segments would change OutSegs."""
    with Lab(loss=0) as lab:
        yield lab


def counted(lab: Lab) -> dict[str, int]:
    assert lab.wait_idle(DEADLINE_S)
    return lab.client.counters()


def sums_to(capture: Recording, port: int, host: Host, before: dict[str, int]) -> Callable[[], Rows | None]:
    """Return a condition: the host has as many segments as its kernel's counters have increased by since `before`.

    Its value is the rows of what was sent first. A machine that stands still may send some again, though none is lost.
    """

    def condition() -> Rows | None:
        rows = capture.of_port(TRANSMITS, port)
        rows = rows[rows["s"]["flow"]["netns"] == host.netns]
        again = rows["is_retransmit"] == 1
        now = host.counters()
        captured = {"OutSegs": rows[~again]["s"]["segs"].sum(), "RetransSegs": rows[again]["s"]["segs"].sum()}
        return rows[~again] if captured == {name: now[name] - before[name] for name in captured} else None

    return condition


def from_to(rows: Rows, sport: int, dport: int) -> Rows:
    flow = rows["s"]["flow"]
    segments: Rows = rows["s"][(flow["sport"] == sport) & (flow["dport"] == dport)]
    return segments


def in6(address: str) -> bytes:
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(address)


def test_1009_connections_are_captured_segment_for_segment(capture: Recording, lab: Lab, port: int) -> None:
    before = counted(lab)
    for _ in range(1009):
        with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
            pair.exchange(1, 7)
            pair.end()
    rows = wait_for(sums_to(capture, port, lab.client, before), "as many segments as the kernel counted")
    flags = rows["s"]["tcp_flags"]
    assert (flags == SYN).sum() == 1009
    assert (flags == SYN | ACK).sum() == 1009
    assert (flags & FIN).astype(bool).sum() == 2 * 1009
    assert rows["s"]["payload_len"].sum() == 8 * 1009


@pytest.mark.parametrize(
    ("address", "on_wire"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::ffff:127.0.0.1", "127.0.0.1")],
    ids=["ipv4", "ipv6", "v4-mapped"],
)
def test_each_field_is_what_the_sender_knows(
    capture: Recording, lab: Lab, port: int, address: str, on_wire: str
) -> None:
    if on_wire == "::1" and not sees_ipv6_synacks(capture):
        pytest.skip("this kernel does not run cgroup programs for SYN-ACKs over IPv6 (like Linux 6.1)")
    start = time.monotonic_ns()
    before = counted(lab)
    with Pair(lab.client, lab.client, address, port) as pair:
        sport = pair.client.getsockname()[1]
        cookies = cookie_of(pair.client), cookie_of(pair.accepted)
        pair.exchange(1009, 97)
        mss = pair.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        pair.end()
    rows = wait_for(sums_to(capture, port, lab.client, before), "as many segments as the kernel counted")
    there, back = from_to(rows, sport, port), from_to(rows, port, sport)
    assert len(there) + len(back) == len(rows)
    flow = rows["s"]["flow"]
    assert {bytes(each) for each in flow["saddr"]} == {bytes(each) for each in flow["daddr"]} == {in6(on_wire)}
    assert set(flow["netns"]) == {lab.client.netns}
    assert set(flow["uid"]) == {0}
    assert {HOOKS[hook] for hook in set(flow["hook"])} == {capture.kernel.hooks_in_use["transmit"]}
    assert set(rows["s"]["sample_rate"]) == {1}

    segments, answers = there[there["payload_len"] == 97], back[back["payload_len"] == 1]
    assert len(segments) == len(answers) == 1009
    assert set(segments["tcp_flags"]) == set(answers["tcp_flags"]) == {PSH | ACK}
    assert set(segments["state"]) == {STATES.index("ESTABLISHED")}
    assert (np.diff(segments["seq"]) == 97).all()
    assert (segments["end_seq"] - segments["seq"] == 97).all()
    assert (segments["ack_seq"] == answers["seq"]).all(), "each segment acknowledges up to the answer that follows"
    assert segments["mss"][-1] == mss
    assert set(segments["flow"]["sk_cookie"]) == {cookies[0]}
    assert set(answers["flow"]["sk_cookie"]) == {cookies[1]}
    assert (np.diff(segments["ts"].astype(np.int64)) > 0).all()
    assert start < segments["ts"][0] < segments["ts"][-1] < time.monotonic_ns()


def test_a_handshake_is_three_segments_and_the_timers_are_in_microseconds(
    capture: Recording, lab: Lab, port: int
) -> None:
    with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
        sport = pair.client.getsockname()[1]
    rows = capture.wait_rows(TRANSMITS, port, 3)["s"]
    syn, syn_ack, ack = rows[:3]
    assert [row["tcp_flags"] for row in rows[:3]] == [SYN, SYN | ACK, ACK]
    assert [STATES[row["state"]] for row in rows[:3]] == ["SYN_SENT", "SYN_RECV", "ESTABLISHED"]
    assert (syn["flow"]["sport"], syn_ack["flow"]["sport"]) == (sport, port)
    assert syn["end_seq"] == syn["seq"] + 1 == syn_ack["ack_seq"] == ack["seq"]
    assert syn_ack["end_seq"] == syn_ack["seq"] + 1 == ack["ack_seq"]
    assert (syn["payload_len"], syn_ack["payload_len"], ack["payload_len"]) == (0, 0, 0)
    assert syn["rto_us"] == 1_000_000, "RFC 6298: one second before the first measurement"
    assert syn["snd_cwnd"] == 10
    assert syn["snd_ssthresh"] == 0x7FFFFFFF
    assert syn_ack["flow"]["sk_cookie"] == 0
    assert not syn_ack["flow"]["flow_known"] & KNOWN["sk_cookie"], "a request has no cookie yet"
    assert not syn_ack["known"] & KNOWN["tcp"]
    assert syn_ack["flow"]["flow_known"] & KNOWN["uid"], "the listener's"


def test_a_super_segment_counts_as_the_kernel_counts_it(capture: Recording, lab: Lab, port: int) -> None:
    before = counted(lab)
    size = 1_000_003
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        sport = pair.client.getsockname()[1]
        pair.transfer(size)
        pair.end()
    sent = wait_for(sums_to(capture, port, lab.client, before), "as many segments as the kernel counted")
    rows = from_to(sent, sport, port)
    assert rows["payload_len"].sum() == size
    assert rows["segs"].max() > 1


def test_uid_is_that_of_the_sockets_owner(capture: Recording, lab: Lab, port: int) -> None:
    libc = ctypes.CDLL(None)
    libc.setfsuid(4711)  # for this thread only; a socket's owner is the file system user
    try:
        with Pair(lab.client, lab.client, "127.0.0.1", port):
            pass
    finally:
        libc.setfsuid(0)
    rows = capture.wait_rows(TRANSMITS, port, 3)
    assert set(rows["s"]["flow"]["uid"]) == {4711}
    assert (rows["s"]["flow"]["flow_known"] & KNOWN["uid"]).all()


def test_cgroup_id_is_the_inode_of_the_cgroups_folder(capture: Recording, lab: Lab, port: int) -> None:
    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    folder = root / f"rebpf-test-{os.getpid()}"
    folder.mkdir()
    try:
        with inside(lab.client), socket.create_server(("127.0.0.1", port)):
            # The child joins the cgroup before it creates its socket.
            program = (
                "import os, socket, sys\n"
                "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
                "socket.create_connection(('127.0.0.1', int(sys.argv[2]))).close()\n"
            )
            command = [sys.executable, "-c", program, str(folder / "cgroup.procs"), str(port)]
            subprocess.run(lab.client.command(*command), check=True)
        rows = capture.wait_rows(TRANSMITS, port, 3)
        mine = rows["s"]["flow"][rows["s"]["flow"]["dport"] == port]
        assert set(mine["cgroup_id"]) == {folder.stat().st_ino}
        assert (mine["flow_known"] & KNOWN["cgroup_id"]).all()
        listener = rows["s"]["flow"][rows["s"]["flow"]["sport"] == port]
        assert folder.stat().st_ino not in set(listener["cgroup_id"])
    finally:
        folder.rmdir()


def test_the_reset_of_a_closed_port_has_no_socket_but_a_namespace(capture: Recording, lab: Lab, port: int) -> None:
    if capture.kernel.hooks_in_use["transmit"] != "cgroup_skb":
        pytest.skip("only the cgroup_skb hook sees segments without a socket")
    with inside(lab.client), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    rows = capture.wait_rows(TRANSMITS, port, 2)
    assert len(rows) == 2
    reset = rows[1]
    assert reset["s"]["tcp_flags"] == RST | ACK
    assert reset["s"]["ack_seq"] == rows[0]["s"]["end_seq"]
    assert reset["s"]["flow"]["netns"] == lab.client.netns
    assert reset["s"]["flow"]["flow_known"] == 0
    assert reset["s"]["state"] == STATES.index("UNKNOWN")
    assert reset["s"]["known"] & (KNOWN["tcp"] | KNOWN["is_retransmit"]) == KNOWN["is_retransmit"]
    assert not reset["is_retransmit"]


def test_the_numbers_of_each_cpu_have_no_gap_and_no_repeat(capture: Recording, lab: Lab, port: int) -> None:
    with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
        pair.exchange(13, 1)
    wait_for(lambda: len(capture.all(TRANSMITS)) == capture.kernel.counters(TRANSMITS).passed, "all events")
    rows = capture.all(TRANSMITS)
    assert capture.kernel.counters(TRANSMITS).ring_full == 0
    for cpu in set(rows["s"]["cpu"]):
        numbers = np.sort(rows["s"]["cpu_seq"][rows["s"]["cpu"] == cpu])
        assert (numbers == np.arange(1, len(numbers) + 1)).all()


def test_hz_is_the_running_kernels() -> None:
    config = Path(f"/boot/config-{os.uname().release}")
    assert jiffies_per_second() in (100, 250, 300, 1000)
    if config.exists():
        assert f"CONFIG_HZ={jiffies_per_second()}\n" in config.read_text()
