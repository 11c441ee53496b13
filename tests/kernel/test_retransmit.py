"""The retransmit stream: real loss between two namespaces, against the kernel's own counters, and each cause."""

import contextlib
import errno
import os
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import CAUSES, HOOKS, KNOWN, RETRANSMITS, STREAMS, TRANSMITS, Rows
from producer.host.cgroups import cgroup2_root
from producer.kernel.bpf_syscall import (
    ATTACH_CGROUP_EGRESS,
    PROG_CGROUP_SKB,
    attach_cgroup,
    close_all,
    instruction,
    load_program,
)
from producer.kernel.btf import TYPEDEF, Btf
from tests.support.capture import DEADLINE_S, Pair, Recording, Skips, cookie_of, rules, sees_ipv6_synacks, wait_for
from tests.support.netfilter_queue import queued

pytestmark = pytest.mark.root

SYN, ACK = 2, 16
MAX_SEGS = 46  # of one skb: 64 KiB in segments of 1,448 bytes


def cause_is(rows: Rows, *causes: str) -> Rows:
    return rows[np.isin(rows["cause"], [CAUSES.index(cause) for cause in causes])]


def segs(rows: Rows) -> int:
    return int(rows["s"]["segs"].sum())


def knows(rows: Rows, name: str) -> bool:
    """Whether the hook filled the field in all rows."""
    return bool((rows["s"]["known"] & KNOWN[name]).all())


def pair_ids(rows: Rows) -> Counter[tuple[int, ...]]:
    """Return what a retransmission has in both streams, and no other of the connection; not of SYN-ACKs."""
    rows = rows[rows["s"]["known"] & KNOWN["tcp"] != 0]
    flow, segment = rows["s"]["flow"], rows["s"]
    columns = flow["netns"], flow["sk_cookie"], flow["sport"], flow["dport"], segment["seq"], segment["total_retrans"]
    return Counter(zip(*(column.tolist() for column in columns), strict=True))


def of_host(rows: Rows, host: Host) -> Rows:
    chosen: Rows = rows[rows["s"]["flow"]["netns"] == host.netns]
    return chosen


def events(capture: Recording, port: int, condition: Callable[[Rows], bool], what: str) -> Rows:
    """Wait until the retransmits of a port meet a condition, and return them."""

    def fulfilled() -> Rows | None:
        rows = capture.of_port(RETRANSMITS, port)
        return rows if condition(rows) else None

    return wait_for(fulfilled, what)


@pytest.mark.parametrize("percent", [3, 10])
def test_segments_add_up_to_the_kernels_counters(capture: Recording, lab: Lab, port: int, percent: int) -> None:
    assert lab.wait_idle(DEADLINE_S)
    before = {host.name: host.counters() for host in lab.hosts}
    skips = Skips(capture)
    drop = f"tcp dport {port} numgen random mod 100 < {percent} drop"
    with rules(lab.server, "prerouting", drop), rules(lab.client, "prerouting", drop.replace("dport", "sport")):
        # Whole super-segments are lost, so some transfers may lose none.
        for _ in range(50):
            with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
                pair.transfer(3_000_017)
                pair.end()
            assert lab.wait_idle(DEADLINE_S)
            if len(cause_is(capture.of_port(RETRANSMITS, port), "fast")) > 2:
                break
    rows = capture.of_port(RETRANSMITS, port)
    # Only events of runs that the kernel skipped may be missing.
    may_miss = {stream: MAX_SEGS * skips.of(stream) for stream in STREAMS}
    assert {CAUSES[cause] for cause in set(rows["cause"])} <= {"rto", "fast", "slow_start", "tlp", "syn", "syn_ack"}
    assert (rows["err"] == 0).all()

    def moved(host: Host, name: str) -> int:
        return host.counters()[name] - before[host.name][name]

    for host in lab.hosts:
        mine = of_host(rows, host)
        assert 0 <= moved(host, "RetransSegs") - segs(mine) <= may_miss[RETRANSMITS]
        for name, causes in (
            ("TCPFastRetrans", ["fast"]),
            ("TCPSlowStartRetrans", ["slow_start"]),
            ("TCPSynRetrans", ["syn", "syn_ack"]),
        ):
            assert 0 <= moved(host, name) - segs(cause_is(mine, *causes)) <= may_miss[RETRANSMITS]
    assert len(cause_is(rows, "fast")) > 2, "this much loss must cause fast retransmits"
    assert {HOOKS[hook] for hook in set(rows["s"]["flow"]["hook"])} == {capture.kernel.hooks_in_use["retransmit"]}

    # The transmit stream has and marks each of them too, but not all hooks can recognize a SYN-ACK.
    sent = capture.of_port(TRANSMITS, port)
    for host in lab.hosts:
        mine = of_host(sent, host)
        marked = segs(mine[mine["is_retransmit"] == 1])
        if not knows(mine[mine["s"]["tcp_flags"] == SYN | ACK], "is_retransmit"):
            marked += segs(cause_is(of_host(rows, host), "syn_ack"))
        assert 0 <= moved(host, "RetransSegs") - marked <= may_miss[TRANSMITS]
    # Both events of a retransmission have the same id, and no others have it.
    pairs = pair_ids(rows)
    assert max(pairs.values()) == 1
    assert (pairs - pair_ids(sent[sent["is_retransmit"] == 1])).total() <= may_miss[TRANSMITS]


def test_a_lost_syn_is_a_syn(capture: Recording, lab: Lab, port: int) -> None:
    first = f"tcp dport {port} tcp flags & (syn|ack) == syn numgen inc mod 997 == 0 drop"
    with rules(lab.server, "prerouting", first), Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        cookie = cookie_of(pair.client)
    (row,) = capture.wait_rows(RETRANSMITS, port, 1)
    assert CAUSES[row["cause"]] == "syn"
    assert (row["retransmit_no"], row["err"]) == (1, 0)
    assert row["s"]["tcp_flags"] == SYN
    assert (row["s"]["end_seq"] - row["s"]["seq"], row["s"]["payload_len"]) == (1, 0)
    assert row["s"]["flow"]["dport"] == port
    assert row["s"]["flow"]["netns"] == lab.client.netns
    if row["s"]["flow"]["flow_known"] & KNOWN["sk_cookie"]:  # a kprobe cannot create the cookie
        assert row["s"]["flow"]["sk_cookie"] == cookie
    sent = capture.of_port(TRANSMITS, port)
    syns = sent[(sent["s"]["tcp_flags"] == SYN)]
    assert list(syns["is_retransmit"]) == [0, 1]


def test_a_lost_syn_ack_is_a_syn_ack_and_is_numbered(capture: Recording, lab: Lab, port: int) -> None:
    assert lab.wait_idle(DEADLINE_S)
    before = lab.server.counters()["RetransSegs"]
    first = f"tcp sport {port} tcp flags & (syn|ack) == syn|ack numgen inc mod 997 < 2 drop"
    address = lab.server.ipv6 if sees_ipv6_synacks(capture) else lab.server.ipv4
    with rules(lab.client, "prerouting", first), Pair(lab.client, lab.server, address, port):
        pass
    rows = of_host(capture.wait_rows(RETRANSMITS, port, 1), lab.server)
    assert {CAUSES[cause] for cause in rows["cause"]} == {"syn_ack"}
    assert segs(rows) == lab.server.counters()["RetransSegs"] - before
    assert list(rows["retransmit_no"]) == list(range(1, len(rows) + 1))
    assert set(rows["s"]["tcp_flags"]) == {SYN | ACK}
    assert set(rows["s"]["flow"]["sport"]) == {port}
    assert not (rows["s"]["flow"]["flow_known"] & KNOWN["sk_cookie"]).any()


def test_silence_is_probed_for_and_then_times_out(capture: Recording, lab: Lab, port: int) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        cookie = cookie_of(pair.client)

        def timeouts(rows: Rows) -> Rows:
            return cause_is(of_host(rows, lab.client), "rto")

        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(101))
            rows = events(capture, port, lambda rows: len(timeouts(rows)) >= 3, "three timeouts")
        assert len(pair.accepted.recv(101, socket.MSG_WAITALL)) == 101
    assert list(timeouts(rows)["retransmit_no"][:3]) == [1, 2, 3]
    rows = of_host(rows, lab.client)
    assert set(rows["s"]["payload_len"]) == {101}
    assert set(rows["s"]["flow"]["sk_cookie"]) == {cookie}
    assert len(set(rows["s"]["seq"])) == 1
    assert {CAUSES[cause] for cause in rows["cause"]} <= {"tlp", "rto"}


def needs_failures(capture: Recording) -> None:
    """Skip the test if the hook does not see failed retransmissions."""
    if capture.kernel.hooks_in_use["retransmit"] in ("raw_tp", "cgroup_skb"):
        btf = Btf.load()
        tracepoint = btf.find(TYPEDEF, "btf_trace_tcp_retransmit_skb")
        assert tracepoint is not None
        if btf.params(tracepoint) < 4:
            pytest.skip("this kernel's tracepoint does not fire for failures (before Linux 6.17)")


def test_a_retransmission_that_the_host_drops_has_its_error(capture: Recording, lab: Lab, port: int) -> None:
    needs_failures(capture)
    assert lab.wait_idle(DEADLINE_S)
    before = lab.client.counters()["RetransSegs"]
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(101))
            with rules(lab.client, "output", f"tcp dport {port} drop"):
                rows = events(capture, port, lambda rows: (rows["err"] != 0).any(), "a failed retransmission")
        assert len(pair.accepted.recv(101, socket.MSG_WAITALL)) == 101
    assert set(rows["err"][rows["err"] != 0]) == {-1}, f"EPERM: {os.strerror(1)}"
    assert segs(capture.of_port(RETRANSMITS, port)) == lab.client.counters()["RetransSegs"] - before


@contextlib.contextmanager
def rerouted(host: Host, port: int, kind: str) -> Iterator[None]:
    """Let the firewall mark what goes to a port, so that routing drops it, by a route of this kind."""
    chain = f"chain c {{ type route hook output priority mangle; tcp dport {port} meta mark set 7; }};"
    run(host, "ip", "rule", "add", "fwmark", "7", "lookup", "77")
    run(host, "ip", "route", "add", kind, "default", "table", "77")
    run(host, "nft", f"table ip reroute {{ {chain} }}")
    try:
        yield
    finally:
        run(host, "nft", "delete table ip reroute")
        run(host, "ip", "route", "flush", "table", "77")
        run(host, "ip", "rule", "delete", "fwmark", "7")


def run(host: Host, *argv: str) -> None:
    subprocess.run(host.command(*argv), check=True)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("blackhole", errno.EINVAL), ("unreachable", errno.EHOSTUNREACH), ("prohibit", errno.EACCES)],
)
def test_a_retransmission_that_the_hosts_routing_drops_has_its_error(
    capture: Recording, lab: Lab, port: int, kind: str, error: int
) -> None:
    """Some of these are also the errors of a retransmission that was not tried."""
    needs_failures(capture)
    assert lab.wait_idle(DEADLINE_S)
    before = lab.client.counters()["RetransSegs"]
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(101))
            with rerouted(lab.client, port, kind):
                rows = events(capture, port, lambda rows: (rows["err"] != 0).any(), "a failed retransmission")
        assert len(pair.accepted.recv(101, socket.MSG_WAITALL)) == 101
    assert set(rows["err"][rows["err"] != 0]) == {-error}
    again = of_host(capture.of_port(RETRANSMITS, port), lab.client)
    assert segs(again) == lab.client.counters()["RetransSegs"] - before


def test_a_retransmission_without_a_route_is_no_event(capture: Recording, port: int) -> None:
    with Lab(loss=0) as lab, Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        skips = Skips(capture)
        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(101))
            run(lab.client, "ip", "route", "flush", "dev", "veth0")
            before = lab.client.counters()
            wait_for(lambda: lab.client.counters()["TCPTimeouts"] >= before["TCPTimeouts"] + 2, "timeouts")
        again = segs(of_host(capture.of_port(RETRANSMITS, port), lab.client))
        assert lab.client.counters()["RetransSegs"] == before["RetransSegs"]
        assert before["RetransSegs"] - again in range(skips.of(RETRANSMITS) + 1)


@contextlib.contextmanager
def marked_packets_dropped(mark: int) -> Iterator[None]:
    """Attach a program to the root cgroup that drops what sockets with this mark send."""
    mark_of_packet = 8  # in struct __sk_buff
    steps = [(0x61, 2, 1, mark_of_packet, 0), (0xB7, 0, 0, 0, 1), (0x55, 2, 0, 1, mark), (0xB7, 0, 0, 0, 0)]
    code = b"".join(instruction(*step) for step in [*steps, (0x95, 0, 0, 0, 0)])
    root = cgroup2_root()
    assert root is not None
    folder = os.open(root, os.O_RDONLY)
    program = load_program("drops", code, PROG_CGROUP_SKB, attach_type=ATTACH_CGROUP_EGRESS)
    link = attach_cgroup(program, folder, ATTACH_CGROUP_EGRESS)
    try:
        yield
    finally:
        close_all([link, program, folder])


def test_a_retransmission_that_another_program_drops_is_one_event(capture: Recording, lab: Lab, port: int) -> None:
    """As by systemd's IPAddressDeny=: the kernel runs the program of the cgroup hook nevertheless."""
    assert lab.wait_idle(DEADLINE_S)
    before = lab.client.counters()["RetransSegs"]
    skips = Skips(capture)
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair, marked_packets_dropped(port):
        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(101))
            pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, port)
            wait_for(lambda: lab.client.counters()["RetransSegs"] - before >= 3, "three retransmissions")
            pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
        assert len(pair.accepted.recv(101, socket.MSG_WAITALL)) == 101
    again = of_host(capture.of_port(RETRANSMITS, port), lab.client)
    missing = lab.client.counters()["RetransSegs"] - before - segs(again)
    assert missing in range(skips.of(RETRANSMITS) + 1), again[["cause", "err"]]


def test_a_segment_that_a_netfilter_queue_delays_is_not_taken_for_a_retransmission(
    capture: Recording, port: int
) -> None:
    """When the hook sees a packet again, TCP has already counted it as sent."""
    with Lab(loss=0) as lab, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(queued(lab.client))
        except OSError:
            pytest.skip("this kernel has no netfilter queue")
        skips = Skips(capture)
        with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            pair.exchange(31, 7)
            with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
                pair.client.sendall(bytes(7))
                events(capture, port, lambda rows: len(cause_is(of_host(rows, lab.client), "rto")) >= 2, "timeouts")
            assert len(pair.accepted.recv(7, socket.MSG_WAITALL)) == 7
        assert lab.wait_idle(DEADLINE_S)
        again = of_host(capture.of_port(RETRANSMITS, port), lab.client)
        missing = lab.client.counters()["RetransSegs"] - segs(again)
    assert missing in range(skips.of(RETRANSMITS) + 1)
