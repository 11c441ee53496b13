"""Unacknowledged SYN-ACKs: each retransmission is an event, however many requests exist at once."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import CAUSES, KNOWN, RETRANSMITS, TRANSMITS, Rows, Stream
from tests.support.capture import Recording, Skips, hook_settings, inside, sees_ipv6_synacks, wait_for
from tests.support.rules import filtered
from tests.support.tun import Tun

pytestmark = pytest.mark.root

SYN, RST, ACK = 2, 4, 16
_FIRST_PORT = 30_000  # above all ports of the tests
_IPPROTO_MPTCP = 262
SETTINGS = {
    "core.somaxconn": 65_535,
    "ipv4.tcp_max_syn_backlog": 65_535,
    "ipv4.tcp_syncookies": 0,
    "ipv4.tcp_synack_retries": 1,
}


@pytest.fixture
def host() -> Iterator[Host]:
    """A separate namespace that accepts 65,535 requests at once and sends each SYN-ACK twice."""
    with Lab(loss=0) as lab:
        setting(lab.server, SETTINGS)
        yield lab.server


@pytest.fixture
def far(host: Host) -> Iterator[Tun]:
    with Tun(host) as far:
        yield far


@pytest.fixture
def port() -> int:
    """Not a port of the shared recording, whose rings are too small for these tests."""
    return 7_000 + os.getpid() % 2_900


@pytest.fixture
def roomy(port: int) -> Iterator[Recording]:
    """A separate recording whose rings hold all events of the largest test, even unread."""
    rings = {"transmit_pipe": 1 << 26, "retransmit_pipe": 1 << 26, "flow_pipe": 1 << 22}
    with Recording(hook_settings(rules=filtered(ports=(port,)), ring_bytes=rings)) as capture:
        yield capture


def setting(host: Host, values: dict[str, int]) -> None:
    for name, value in values.items():
        subprocess.run(host.command("sysctl", "-qw", f"net.{name}={value}"), check=True)


@contextlib.contextmanager
def listening(host: Host, far: Tun, version: int, port: int, *, mapped: bool = False) -> Iterator[socket.socket]:
    with inside(host):
        family = socket.AF_INET6 if version == 6 or mapped else socket.AF_INET
        bound = "::" if mapped else far.near[version]
        listener = socket.create_server((bound, port), family=family, backlog=65_535, dualstack_ipv6=mapped)
    with listener:
        yield listener


@contextlib.contextmanager
def listening_for_multipath(host: Host, far: Tun, version: int, port: int) -> Iterator[socket.socket]:
    """As programs in Go do by default: plain TCP reaches such a listener, too."""
    with inside(host):
        listener = socket.socket(
            socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP
        )
    with listener:
        listener.bind((far.near[version], port))
        listener.listen()
        yield listener


def events(capture: Recording, stream: Stream, host: Host, port: int) -> Rows:
    rows = capture.of_port(stream, port)
    chosen: Rows = rows[rows["s"]["flow"]["netns"] == host.netns]
    return chosen


def syn_acks(rows: Rows) -> list[tuple[int, int]]:
    """Return the port and sequence number of each, sorted."""
    return sorted(zip(rows["s"]["flow"]["dport"].tolist(), rows["s"]["seq"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("version", "mapped", "count"),
    [(4, False, 30_011), (6, False, 1_009), (4, True, 1_009)],
    ids=["ipv4", "ipv6", "mapped"],
)
def test_each_retransmitted_syn_ack_is_an_event(
    roomy: Recording, host: Host, far: Tun, port: int, version: int, mapped: bool, count: int
) -> None:
    if version == 6 and not sees_ipv6_synacks(roomy):
        pytest.skip("this kernel does not run cgroup programs for SYN-ACKs over IPv6 (like Linux 6.1)")
    skips = Skips(roomy)
    with listening(host, far, version, port, mapped=mapped):
        for sport in range(_FIRST_PORT, _FIRST_PORT + count):
            far.send(version, sport, port, SYN)
            if not sport % 1000:  # before the queue is full
                far.read()
        wait_for(lambda: len(far.read()) >= 2 * count, "each SYN-ACK twice")
    kernel = host.counters()
    sent, again = events(roomy, TRANSMITS, host, port), events(roomy, RETRANSMITS, host, port)
    lost = {stream: skips.of(stream) for stream in (TRANSMITS, RETRANSMITS)}
    assert kernel["TCPSynRetrans"] == kernel["RetransSegs"] == count
    assert kernel["OutSegs"] == len(far.sent) == 2 * count

    wire = sorted({(each.dport, each.seq) for each in far.sent})
    assert len(wire) == count
    assert set(syn_acks(again)) <= set(wire)
    assert 0 <= count - len(again) <= lost[RETRANSMITS]
    assert set(again["cause"]) == {CAUSES.index("syn_ack")}
    assert set(again["retransmit_no"]) == {1}
    assert set(again["s"]["tcp_flags"]) == {SYN | ACK}
    assert 0 <= 2 * count - len(sent) <= lost[TRANSMITS]
    if roomy.kernel.hooks_in_use["transmit"] == "cgroup_skb":
        assert set(again["s"]["ifindex"]) == set(sent["s"]["ifindex"]) == {far.ifindex}
        assert (again["s"]["known"] & KNOWN["ifindex"]).all()
        assert (sent["s"]["known"] & KNOWN["is_retransmit"]).all()
        _, first = np.unique(sent["s"]["flow"]["dport"], return_index=True)
        assert set(np.flatnonzero(sent["is_retransmit"] == 0)) == set(first)


@pytest.mark.parametrize("version", [4, 6])
def test_the_syn_acks_of_a_listener_for_multipath_tcp_are_recognized(
    roomy: Recording, host: Host, far: Tun, port: int, version: int
) -> None:
    with listening_for_multipath(host, far, version, port):
        far.send(version, _FIRST_PORT, port, SYN)
        wait_for(lambda: len(far.read()) >= 2, "the SYN-ACK twice")
    sent, (again,) = events(roomy, TRANSMITS, host, port), events(roomy, RETRANSMITS, host, port)
    assert (CAUSES[again["cause"]], again["retransmit_no"]) == ("syn_ack", 1)
    if roomy.kernel.hooks_in_use["transmit"] == "cgroup_skb":
        assert (sent["s"]["known"] & KNOWN["is_retransmit"]).all()
        assert list(sent["is_retransmit"]) == [0, 1]


def test_retransmitted_syn_acks_are_events_although_their_addresses_are_translated(
    host: Host, far: Tun, port: int
) -> None:
    """The hook sees the packet behind the translation, and finds no request that belongs to it."""
    chain = f"type nat hook prerouting priority dstnat; tcp dport {port + 1} redirect to :{port};"
    subprocess.run(
        host.command("nft", "-f", "-"), input=f"table ip test {{ chain c {{ {chain} }}; }}", text=True, check=True
    )
    with Recording(hook_settings(rules=filtered(ports=(port, port + 1)))) as capture, listening(host, far, 4, port):
        skips = Skips(capture)
        for sport in range(_FIRST_PORT, _FIRST_PORT + 97):
            far.send(4, sport, port + 1, SYN)
        wait_for(lambda: len(far.read()) >= 2 * 97, "each SYN-ACK twice")
        again = events(capture, RETRANSMITS, host, port)
        assert host.counters()["RetransSegs"] == 97
        assert 0 <= 97 - len(again) <= skips.of(RETRANSMITS)
    assert set(syn_acks(again)) <= {(each.dport, each.seq) for each in far.sent}
    assert set(again["retransmit_no"]) == {1}


def test_the_syn_acks_of_syn_cookies_are_counted_by_the_kernel(
    roomy: Recording, host: Host, far: Tun, port: int
) -> None:
    setting(host, {"ipv4.tcp_syncookies": 2})
    with listening(host, far, 4, port):
        for sport in range(_FIRST_PORT, _FIRST_PORT + 307):
            far.send(4, sport, port, SYN)
        wait_for(lambda: len(far.read()) >= 307, "as many answers")
    kernel = host.counters()
    missing = kernel["OutSegs"] - len(events(roomy, TRANSMITS, host, port))
    assert kernel["OutSegs"] == kernel["SyncookiesSent"] == 307
    assert missing == (kernel["SyncookiesSent"] if roomy.kernel.hooks_in_use["transmit"] == "cgroup_skb" else 0)
    assert len(events(roomy, RETRANSMITS, host, port)) == 0


def test_the_syn_ack_of_tcp_fast_open_is_no_retransmit(roomy: Recording, host: Host, far: Tun, port: int) -> None:
    setting(host, {"ipv4.tcp_fastopen": 0x202})  # without a cookie
    with listening(host, far, 4, port) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 100)
        far.send(4, _FIRST_PORT, port, SYN, payload=b"hello")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(5) == b"hello"
            first = events(roomy, TRANSMITS, host, port)
            assert len(events(roomy, RETRANSMITS, host, port)) == 0
            assert not first["is_retransmit"].any()
            wait_for(lambda: len(far.read()) >= 2, "the SYN-ACK again")
    (again,) = events(roomy, RETRANSMITS, host, port)
    assert (CAUSES[again["cause"]], again["retransmit_no"]) == ("syn_ack", 1)
    assert host.counters()["TCPSynRetrans"] == 1


def test_a_delayed_syn_ack_is_no_retransmit(roomy: Recording, host: Host, far: Tun, port: int) -> None:
    with listening(host, far, 4, port) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, 37, 1_003)  # TCP_TX_DELAY, in microseconds
        far.send(4, _FIRST_PORT, port, SYN)
        wait_for(lambda: len(far.read()) >= 2, "the SYN-ACK twice")
    sent = events(roomy, TRANSMITS, host, port)
    assert len(events(roomy, RETRANSMITS, host, port)) == 1
    if roomy.kernel.hooks_in_use["transmit"] == "cgroup_skb":
        assert list(sent["is_retransmit"]) == [0, 1]


def test_a_syn_ack_that_the_hosts_queue_drops_is_a_retransmit_that_the_kernel_does_not_count(
    roomy: Recording, host: Host, far: Tun, port: int
) -> None:
    far.hold(31)
    with listening(host, far, 4, port):
        for sport in range(_FIRST_PORT, _FIRST_PORT + 97):
            far.send(4, sport, port, SYN)
        wait_for(lambda: host.counters()["OutSegs"] >= 2 * 97, "the SYN-ACKs again")
    again = events(roomy, RETRANSMITS, host, port)
    assert host.counters()["TCPSynRetrans"] == 0
    assert len(again) == (97 if roomy.kernel.hooks_in_use["retransmit"] == "cgroup_skb" else 0)
