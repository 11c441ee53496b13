"""The truth suite: under each kind of disturbance, the events match the kernel's counters and the wire.

A Trial compares the three on exit, with zero tolerance. The tests cause the disturbance and check that it happened.
"""

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import RETRANSMITS, TRANSMITS, Rows
from tests.support.capture import Pair, Recording, inside, kernel_version, receive, rules, wait_for
from tests.support.comparison import ACK, INTERFACE, RST, Trial, segs
from tests.support.tcpinfo import TcpInfo, tcp_info

pytestmark = pytest.mark.root


def run(host: Host, *argv: str) -> None:
    subprocess.run(host.command(*argv), check=True)


OFFLOADS = {
    "tso": (),
    "cut": (
        ("ethtool", "-K", INTERFACE, "tso", "off", "gso", "off"),
        ("ethtool", "-K", INTERFACE, "tso", "on", "gso", "on"),
    ),
    "single": (
        ("ip", "link", "set", INTERFACE, "gso_max_segs", "1"),
        ("ip", "link", "set", INTERFACE, "gso_max_segs", "65535"),
    ),
}
"""How super-segments reach the interface: whole, cut by the stack before, or TCP builds none. Do and undo."""


@contextlib.contextmanager
def changed(hosts: Iterable[Host], commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """Run the first command on the hosts, and the second on exit."""
    for host in hosts:
        for argv in commands[:1]:
            run(host, *argv)
    try:
        yield
    finally:
        for host in hosts:
            for argv in commands[1:]:
                run(host, *argv)


def congestion_control(end: socket.socket, name: str) -> None:
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def address(lab: Lab, family: str) -> str:
    return {"ipv4": lab.server.ipv4, "ipv6": lab.server.ipv6, "mapped": f"::ffff:{lab.server.ipv4}"}[family]


@pytest.mark.parametrize(
    ("permille", "kind", "family", "size"),
    [
        (1, "single", "ipv4", 10_000_019),
        (10, "tso", "ipv4", 30_000_001),
        (10, "cut", "ipv6", 10_000_019),
        (100, "tso", "mapped", 3_000_017),
        (100, "single", "ipv6", 1_000_003),
    ],
    ids=["0.1%-single", "1%-tso", "1%-cut-ipv6", "10%-tso-mapped", "10%-single-ipv6"],
)
def test_bulk_with_random_loss(
    capture: Recording, lab: Lab, port: int, permille: int, kind: str, family: str, size: int
) -> None:
    drop = f"tcp dport {port} numgen random mod 1000 < {permille} drop"
    with (
        changed(lab.hosts, OFFLOADS[kind]),
        rules(lab.server, "prerouting", drop),
        rules(lab.client, "prerouting", drop.replace("dport", "sport")),
        Trial(capture, lab, port, whole=kind != "cut") as trial,
    ):
        for _ in range(50):
            with Pair(lab.client, lab.server, address(lab, family), port) as pair:
                pair.transfer(size)
                pair.end()
            if segs(trial.again(lab.client, "fast")) > 2:
                break
        else:
            pytest.fail("expected fast retransmits with this much loss")


def test_a_lost_syn_and_a_lost_syn_ack(capture: Recording, lab: Lab, port: int) -> None:
    syn = f"tcp dport {port} tcp flags & (syn|ack) == syn numgen inc mod 997 == 0 drop"
    syn_ack = f"tcp sport {port} tcp flags & (syn|ack) == syn|ack numgen inc mod 997 == 0 drop"
    with Trial(capture, lab, port) as trial:
        with rules(lab.server, "prerouting", syn), Pair(lab.client, lab.server, lab.server.ipv6, port) as pair:
            pair.end()
        again = trial.moved(lab.client, "TCPSynRetrans")
        assert again >= 1  # on a busy machine, the answer may come late, too
        assert again - segs(trial.again(lab.client, "syn")) in trial.may_miss(RETRANSMITS)
        with rules(lab.client, "prerouting", syn_ack), Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            pair.end()
    assert len(trial.again(lab.server, "syn_ack")) > 0


def test_a_lost_tail_is_probed_for(capture: Recording, lab: Lab, port: int) -> None:
    lost = f"tcp dport {port} meta length 113 numgen inc mod 2 == 0 drop"  # 61 bytes of payload, in every second packet
    with rules(lab.server, "prerouting", lost), Trial(capture, lab, port) as trial:
        with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            for _ in range(50):
                pair.exchange(7, 997)
                pair.exchange(1, 61)
                if trial.moved(lab.client, "TCPLossProbes") >= 5:
                    break  # on a busy machine, a timeout may come first
            pair.end()
        # No data was waiting to be sent, so each probe was a retransmission.
        probes = trial.moved(lab.client, "TCPLossProbes")
        assert probes >= 5
        assert probes - segs(trial.again(lab.client, "tlp")) in trial.may_miss(RETRANSMITS)


def test_a_loss_probe_of_new_data_is_no_retransmit(capture: Recording, lab: Lab, port: int) -> None:
    lost = f"tcp dport {port} meta length 113 numgen inc mod 997 == 0 drop"
    with Trial(capture, lab, port) as trial:
        for _ in range(5):
            first = len(trial.sent(lab.client))
            with (
                rules(lab.server, "prerouting", lost),
                Pair(lab.client, lab.server, lab.server.ipv4, port) as pair,
            ):
                pair.exchange(7, 997)
                pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
                pair.client.sendall(bytes(61))
                pair.client.sendall(bytes(73))  # held back by Nagle's algorithm while the first is in flight
                receive(pair.accepted, 134)
                pair.end()
            probes = trial.moved(lab.client, "TCPLossProbes")
            if probes > segs(trial.again(lab.client, "tlp")):
                break  # on a busy machine, a timeout may come first
        sent = trial.sent(lab.client)[first:]
        assert (sent["is_retransmit"][sent["s"]["payload_len"] == 73] == 0).any(), "the probe"
        assert probes - segs(trial.again(lab.client, "tlp")) - 1 in trial.may_miss(RETRANSMITS)


@contextlib.contextmanager
def slow_lane(lab: Lab, port: int) -> Iterator[None]:
    """Delay some of the client's packets by a slow interface, so that they reach the server after later ones.

    It begins and ends in the server's namespace: the packets are still the client's when they wait.
    """
    shown = subprocess.check_output(lab.server.command("ip", "-j", "link", "show", INTERFACE))
    mac = json.loads(shown)[0]["address"]
    up = (
        f"ip link add slow0 type veth peer name slow1 address {mac} && ip link set slow0 up && ip link set slow1 up"
        " && tc qdisc add dev slow0 root tbf rate 10mbit burst 3000 limit 1000000"
    )
    fwd = f'tcp dport {port} numgen inc mod 23 == 7 fwd to "slow0"'
    table = f'table netdev lane {{ chain c {{ type filter hook ingress device "{INTERFACE}" priority 0; {fwd}; }}; }}'
    run(lab.server, "sh", "-c", up)
    run(lab.server, "nft", table)
    try:
        yield
    finally:
        run(lab.server, "nft", "delete table netdev lane")
        run(lab.server, "ip", "link", "delete", "slow0")


def test_reordering_makes_spurious_retransmits(capture: Recording, lab: Lab, port: int) -> None:
    with changed(lab.hosts, OFFLOADS["single"]), slow_lane(lab, port), Trial(capture, lab, port) as trial:
        for _ in range(50):
            with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
                pair.transfer(1_000_003)
                pair.end()
            if trial.moved(lab.client, "TCPDSACKRecv") > 10:
                break
        else:
            pytest.fail("nothing was lost: the receiver reports that it got the data twice")
    assert segs(trial.again(lab.client, "fast")) > 0


def probes_of(rows: Rows) -> Rows:
    """Select a connection's empty segments from one below snd_nxt, which force an answer."""
    reached = np.maximum.accumulate(rows["s"]["end_seq"] - rows["s"]["seq"][0])  # of the first: a short connection
    chosen: Rows = rows[(rows["s"]["payload_len"] == 0) & (rows["s"]["seq"] - rows["s"]["seq"][0] + 1 == reached)]
    return chosen[chosen["s"]["tcp_flags"] == ACK]


def test_a_closed_window_is_probed_and_no_probe_is_a_retransmit(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        pair.client.setblocking(False)
        size = 0

        def probed() -> bool:
            nonlocal size
            with contextlib.suppress(BlockingIOError):
                size += pair.client.send(bytes(1 << 16))
            return trial.moved(lab.client, "TCPWinProbe") >= 3

        wait_for(probed, "window probes")
        while size:
            size -= len(pair.accepted.recv(1 << 18))
        pair.client.setblocking(True)
        pair.end()
    probes = probes_of(trial.sent(lab.client))
    assert trial.moved(lab.client, "TCPWinProbe") - len(probes) in trial.may_miss(TRANSMITS)
    assert not probes["is_retransmit"].any()


def test_a_keep_alive_is_seen_and_is_no_retransmit(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, lab.server.ipv6, port) as pair:
        pair.exchange(3, 7)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
            pair.client.setsockopt(socket.IPPROTO_TCP, option, value)
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        wait_for(lambda: trial.moved(lab.client, "TCPKeepAlive") > 0, "a keep-alive")
        pair.end()
    probes = probes_of(trial.sent(lab.client))
    assert trial.moved(lab.client, "TCPKeepAlive") - len(probes) in trial.may_miss(TRANSMITS)
    assert not probes["is_retransmit"].any()


def test_1009_short_connections(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial:
        for number in range(1009):
            with Pair(lab.client, lab.server, address(lab, ("ipv4", "ipv6", "mapped")[number % 3]), port) as pair:
                pair.exchange(1, 7)
                pair.end()
    # None is lost, but a stalled machine may delay one.
    resent = {host.name: trial.moved(host, "RetransSegs") for host in lab.hosts}
    assert len(trial.socketless["client"]) <= resent["server"], "only answers to repeated FINs"
    assert len(trial.socketless["server"]) <= resent["client"]
    for host in lab.hosts:
        assert segs(trial.again(host)) <= resent[host.name]


def timeouts_after(trial: Trial, host: Host, count: int) -> Rows | None:
    """Return a host's timeouts after the first `count`, or None."""
    rows = trial.again(host, "rto")[count:]
    return rows if len(rows) else None


def test_small_segments_are_merged_when_retransmitted(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial:
        for _ in range(5):
            before = len(trial.again(lab.client, "rto"))
            with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
                with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
                    for _ in range(11):
                        pair.client.sendall(bytes(7))
                    rows = wait_for(partial(timeouts_after, trial, lab.client, before), "a timeout")
                receive(pair.accepted, 7 * 11)
                pair.end()
            if rows[0]["s"]["payload_len"] == 7 * 11:
                break  # on a busy machine, a timeout may come before all are sent
    assert rows[0]["s"]["payload_len"] == 7 * 11


def test_a_reset_by_the_owner_is_seen(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        pair.exchange(3, 7)
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
        pair.client.close()
        with pytest.raises(ConnectionResetError):
            pair.accepted.recv(1)
    assert (trial.sent(lab.client)["s"]["tcp_flags"] & RST).any()


def sees_socketless(capture: Recording, *, time_wait: bool) -> bool:
    """Whether the hook sees segments without a full socket; those of time wait only before Linux 6.13."""
    return capture.kernel.hooks_in_use["transmit"] == "cgroup_skb" and not (time_wait and kernel_version() >= (6, 13))


def test_the_acknowledgement_in_time_wait(capture: Recording, lab: Lab, port: int) -> None:
    last = f"tcp dport {port} tcp flags & (fin|syn|rst|ack) == ack meta length 52 numgen inc mod 997 == 0 drop"
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        pair.client.shutdown(socket.SHUT_WR)
        assert pair.accepted.recv(1) == b""
        with rules(lab.server, "prerouting", last):
            pair.accepted.close()
            wait_for(lambda: len(trial.again(lab.server)) > 0, "the FIN again")
    assert len(trial.socketless["client"]) == (0 if sees_socketless(capture, time_wait=True) else 1)


def test_the_reset_of_a_closed_port(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port, resets=True) as trial, inside(lab.client), pytest.raises(ConnectionRefusedError):
        socket.create_connection((lab.server.ipv4, port))
    assert len(trial.socketless["server"]) == (0 if sees_socketless(capture, time_wait=False) else 1)


def test_a_blackhole_times_out_and_each_timeouts_state_is_that_of_tcp_info(
    capture: Recording, lab: Lab, port: int
) -> None:
    infos: dict[int, TcpInfo] = {}
    with Trial(capture, lab, port) as trial:
        with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            pair.exchange(7, 997)
            with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
                for _ in range(3):
                    pair.client.sendall(bytes(997))

                def three() -> bool:
                    count = len(trial.again(lab.client, "rto"))
                    info = tcp_info(pair.client)
                    if len(trial.again(lab.client, "rto")) == count:
                        infos[count] = info
                    return count >= 3

                wait_for(three, "three timeouts")
            receive(pair.accepted, 3 * 997)
            pair.end()
        timed_out = trial.moved(lab.client, "TCPTimeouts")
        assert timed_out - segs(trial.again(lab.client, "rto")) in trial.may_miss(RETRANSMITS)
    timeouts = trial.again(lab.client, "rto")
    # The cgroup hook sees the segment before it is counted in retrans_out, the others after.
    counted_later = trial.hook == "cgroup_skb"
    compared = 0
    for number, row in enumerate(timeouts[:3], 1):
        if number not in infos or number - 1 not in infos:
            continue  # the machine was busy
        info = infos[number]
        expected = info.tcp | {"rto_us": infos[number - 1].tcp["rto_us"]}
        expected["retrans_out"] -= counted_later
        assert {name: int(row["s"][name]) for name in expected} == expected
        assert (row["s"]["state"], row["s"]["ca_state"]) == (info.state, info.ca_state)
        compared += 1
    assert compared
    assert list(timeouts["retransmit_no"][:3]) == [1, 2, 3]


def test_the_state_is_that_of_tcp_info(capture: Recording, lab: Lab, port: int) -> None:
    lost = f"tcp dport {port} meta length 113 numgen inc mod 2 == 0 drop"
    samples: dict[int, tuple[TcpInfo, TcpInfo]] = {}
    # Otherwise a paused sender adjusts its state between reading it and sending the segment.
    after_idle = [("sysctl", "-qw", f"net.ipv4.tcp_slow_start_after_idle={value}") for value in (0, 1)]
    with (
        changed([lab.client], after_idle),
        Trial(capture, lab, port) as trial,
        Pair(lab.client, lab.server, lab.server.ipv4, port) as pair,
    ):
        congestion_control(pair.client, "reno")
        with rules(lab.server, "prerouting", lost):
            for _ in range(7):  # a recovery, so that the threshold and the totals have changed
                pair.client.sendall(bytes(61))
                for _ in range(13):
                    pair.client.sendall(bytes(997))
                receive(pair.accepted, 61 + 13 * 997)
                pair.accepted.sendall(b"!")
                assert pair.client.recv(1) == b"!"
        for size in range(101, 1001):
            before = tcp_info(pair.client)
            pair.client.sendall(bytes(size))
            after = tcp_info(pair.client)
            receive(pair.accepted, size)
            pair.accepted.sendall(b"!")
            assert pair.client.recv(1) == b"!"
            # Nothing was received in between, and nothing else was sent.
            if (after.segs_in, after.segs_out) == (before.segs_in, before.segs_out + 1):
                samples[size] = before, after
            if len(samples) == 31:
                break
        pair.end()
    assert len(samples) == 31
    rows = trial.sent(lab.client)
    for size, (before, after) in samples.items():
        row = rows[rows["s"]["payload_len"] == size][0]["s"]
        expected = dict(before.tcp)
        if trial.hook == "cgroup_skb" and "rcv_wnd" in expected:
            expected["rcv_wnd"] = after.tcp["rcv_wnd"]  # the window is chosen when the header is written
        assert {name: int(row[name]) for name in expected} == expected
        assert (row["state"], row["ca_state"]) == (before.state, before.ca_state)
    assert before.tcp["total_retrans"] > 0
    assert before.tcp["snd_ssthresh"] < 0x7FFFFFFF
