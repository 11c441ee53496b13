"""What hosts send only now and then, compared with the counters and the capture as in the truth suite."""

import contextlib
import errno
import socket
import struct
import subprocess
import time

import pytest

from producer.demo.lab import Host, Lab
from producer.events import CAUSES, KNOWN, RETRANSMITS, Rows
from tests.support.capture import DEADLINE_S, Pair, Recording, inside, kernel_version, receive, rules, setting, wait_for
from tests.support.comparison import ACK, FIN, INTERFACE, MAX_SEGS, RST, SYN, Trial, segs
from tests.support.tun import Tun

pytestmark = pytest.mark.root

URG = 32
_TCP_SYNCNT = 7
_HOST_UNREACHABLE, _FRAGMENTATION_NEEDED = 1, 4  # codes of ICMP
_ONCE = "numgen inc mod 997 == 0 drop"


@pytest.mark.parametrize("version", [4, 6])
def test_urgent_data_is_marked(capture: Recording, lab: Lab, port: int, version: int) -> None:
    address = lab.server.ipv4 if version == 4 else lab.server.ipv6
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, address, port) as pair:
        pair.exchange(1, 7)
        for _ in range(5):
            pair.client.send(b"ahead of the others!", socket.MSG_OOB)
            pair.client.sendall(bytes(11))
            receive(pair.accepted, 19 + 11)
        pair.end()
    flags = trial.sent(lab.client)["s"]["tcp_flags"]
    assert 1 <= (flags & URG).astype(bool).sum() < len(flags)


def test_urgent_data_is_marked_when_retransmitted(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        with rules(lab.server, "prerouting", f"tcp dport {port} tcp flags & urg == urg {_ONCE}"):
            pair.client.send(b"ahead of the others!", socket.MSG_OOB)
            receive(pair.accepted, 19)
        pair.end()
    assert (trial.again(lab.client)["s"]["tcp_flags"] & URG).any()


@pytest.mark.parametrize("version", [4, 6])
def test_a_connect_that_nobody_answers(capture: Recording, lab: Lab, port: int, version: int) -> None:
    address = lab.server.ipv4 if version == 4 else lab.server.ipv6
    with (
        Trial(capture, lab, port, given_up=1) as trial,
        rules(lab.server, "prerouting", f"tcp dport {port} drop"),
        inside(lab.client),
        socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, _TCP_SYNCNT, 1)
        with pytest.raises(TimeoutError):
            client.connect((address, port))
    assert trial.moved(lab.client, "TCPSynRetrans") - segs(trial.again(lab.client, "syn")) in trial.may_miss(
        RETRANSMITS
    )
    assert trial.moved(lab.client, "TCPSynRetrans") >= 1
    assert trial.moved(lab.client, "OutSegs") == 1


def test_a_lost_fin(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, lab.server.ipv6, port) as pair:
        pair.exchange(1, 7)
        with rules(lab.server, "prerouting", f"tcp dport {port} tcp flags & fin == fin {_ONCE}"):
            pair.end()
    again = trial.again(lab.client)["s"]
    assert (again["tcp_flags"] & FIN).any()
    assert (again["end_seq"] == again["seq"] + again["payload_len"] + 1).all()


def test_data_for_a_closed_socket_is_answered_by_resets(capture: Recording, lab: Lab, port: int) -> None:
    with (
        Trial(capture, lab, port, resets=True) as trial,
        Pair(lab.client, lab.server, lab.server.ipv4, port) as pair,
    ):
        pair.client.sendall(bytes(7))
        wait_for(lambda: pair.accepted.recv(1, socket.MSG_PEEK), "data that nobody reads")
        pair.accepted.close()
        wait_for(lambda: is_refused(pair.client), "a reset")
    assert trial.moved(lab.server, "OutRsts") >= 1


def is_refused(end: socket.socket) -> bool:
    """Send some data; return whether the connection is gone."""
    try:
        end.sendall(bytes(997))
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


@pytest.mark.parametrize("lost", ["syn", "syn|ack"])
def test_fast_open(capture: Recording, lab: Lab, port: int, lost: str) -> None:
    with contextlib.ExitStack() as stack:
        for host, without_cookie in ((lab.client, 0x5), (lab.server, 0x202)):
            stack.enter_context(setting(host, "net.ipv4.tcp_fastopen", without_cookie))
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 100)
        with inside(lab.client):
            client = stack.enter_context(socket.socket())
        client.settimeout(DEADLINE_S)
        listener.settimeout(DEADLINE_S)
        receiver = lab.server if lost == "syn" else lab.client
        rule = f"tcp flags & (syn|ack) == {lost} {_ONCE}"
        trial = stack.enter_context(Trial(capture, lab, port))
        with rules(receiver, "prerouting", f"meta l4proto tcp {rule}"):
            client.sendto(b"hello", socket.MSG_FASTOPEN, (lab.server.ipv4, port))
            accepted = stack.enter_context(listener.accept()[0])
            accepted.settimeout(DEADLINE_S)
            receive(accepted, 5)
            accepted.sendall(b"!")
            receive(client, 1)
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        accepted.close()
        assert client.recv(1) == b""
    syn = trial.sent(lab.client)["s"][0]
    assert (syn["tcp_flags"], syn["payload_len"], syn["end_seq"] - syn["seq"]) == (SYN, 5, 6)


@pytest.mark.parametrize("version", [4, 6])
def test_two_hosts_that_connect_to_each_other_at_once(capture: Recording, lab: Lab, port: int, version: int) -> None:
    """Both SYNs are lost, so that each host waits when the other's second SYN arrives, and answers with a SYN-ACK."""
    first = f"tcp sport {port} tcp dport {port} tcp flags & (syn|ack) == syn {_ONCE}"
    addresses = [host.ipv4 if version == 4 else host.ipv6 for host in lab.hosts]
    with contextlib.ExitStack() as stack:
        trial = stack.enter_context(Trial(capture, lab, port))
        ends = []
        with rules(lab.server, "prerouting", first), rules(lab.client, "prerouting", first):
            for host, own, peer in zip(lab.hosts, addresses, reversed(addresses), strict=True):
                with inside(host):
                    family = socket.AF_INET if version == 4 else socket.AF_INET6
                    end = stack.enter_context(socket.socket(family))
                end.bind((own, port))
                end.setblocking(False)
                assert end.connect_ex((peer, port)) == errno.EINPROGRESS
                ends.append(end)
            for end in ends:
                wait_for(lambda end=end: is_connected(end), "the connection")
        one, other = ends
        for end in ends:
            end.settimeout(DEADLINE_S)
        one.sendall(b"hello")
        receive(other, 5)
        one.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        other.close()
        assert one.recv(1) == b""
    assert any((trial.sent(host)["s"]["tcp_flags"] == SYN | ACK).any() for host in lab.hosts)


def is_connected(end: socket.socket) -> bool:
    try:
        end.getpeername()
    except OSError:
        return False
    return True


def test_a_path_that_turns_narrow_makes_smaller_retransmits(capture: Recording, lab: Lab, port: int) -> None:
    """As by a router: what is too large is dropped, with an ICMP message to the sender."""
    wide = f"tcp dport {port} meta length > 600 drop"
    with (
        Trial(capture, lab, port) as trial,
        Pair(lab.client, lab.server, lab.server.ipv4, port) as pair,
    ):
        pair.exchange(3, 7)
        with rules(lab.server, "prerouting", wide):
            pair.client.sendall(bytes(5003))
            sent = wait_for(lambda: trial.sent(lab.client)[-1:] if trial_has_data(trial, lab) else None, "the data")
            send_icmp(lab, pair.client, int(sent["s"]["seq"][0]), _FRAGMENTATION_NEEDED, 600)
            receive(pair.accepted, 5003)
        pair.end()
    again = trial.again(lab.client)["s"]
    assert len(again)
    subprocess.run(lab.client.command("ip", "route", "flush", "cache"), check=True)


def trial_has_data(trial: Trial, lab: Lab) -> bool:
    return bool((trial.sent(lab.client)["s"]["payload_len"] > 600).any())


def send_icmp(lab: Lab, end: socket.socket, seq: int, code: int, mtu: int = 0) -> None:
    """Send ICMP `destination unreachable` for a segment, from the server."""
    (saddr, sport), (daddr, dport) = end.getsockname(), end.getpeername()
    segment = struct.pack("!HHI", sport, dport, seq)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 1500, 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
    header += socket.inet_aton(saddr) + socket.inet_aton(daddr)
    body = struct.pack("!HH", 0, mtu) + header + segment
    total = sum(struct.unpack(f"!{(4 + len(body)) // 2}H", struct.pack("!BBH", 3, code, 0) + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    with inside(lab.server), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.sendto(struct.pack("!BBH", 3, code, ~total & 0xFFFF) + body, (saddr, 0))


def test_a_timeout_that_an_icmp_error_brings_forward(capture: Recording, lab: Lab, port: int) -> None:
    """As by a router that no longer reaches the peer: RFC 6069."""
    with (
        Trial(capture, lab, port) as trial,
        Pair(lab.client, lab.server, lab.server.ipv4, port) as pair,
    ):
        pair.exchange(3, 7)
        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(7))
            timeouts = wait_for(lambda: rows if len(rows := trial.again(lab.client, "rto")) >= 3 else None, "timeouts")
            last = timeouts["s"][-1]
            # Each error halves the timeout, by now 1.6 s.
            wait_for(lambda: time.monotonic_ns() - int(last["ts"]) > 500_000_000, "half a second")
            for _ in range(2):
                send_icmp(lab, pair.client, int(last["seq"]), _HOST_UNREACHABLE)
            wait_for(lambda: len(trial.again(lab.client)) > len(timeouts) + 1, "another retransmission")
        receive(pair.accepted, 7)
        pair.end()


def test_retransmissions_into_a_window_that_the_receiver_has_closed_have_no_number(
    capture: Recording, lab: Lab, port: int
) -> None:
    """The receiver's buffer turns small while data is on its way."""
    if kernel_version() < (6, 6):
        pytest.skip("this kernel never shrinks a window (before Linux 6.6)")

    def into_closed_window() -> Rows | None:
        with contextlib.suppress(BlockingIOError):
            pair.client.send(bytes(4001))
        rows = capture.of_port(RETRANSMITS, port)
        rows = rows[(rows["cause"] == CAUSES.index("rto")) & (rows["s"]["snd_wnd"] == 0)]
        return rows if len(rows) else None

    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        pair.client.setblocking(False)
        pair.accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)
        rows = wait_for(into_closed_window, "a retransmission")
    assert not (rows["s"]["known"] & KNOWN["retransmit_no"]).any()


def test_a_retransmission_into_a_closed_window_has_no_number_either_if_timeouts_came_before(
    capture: Recording, lab: Lab, port: int
) -> None:
    """The kernel does not count it as a timeout, and its number would be that of the last one."""

    def timeouts() -> Rows:
        rows = capture.of_port(RETRANSMITS, port)
        chosen: Rows = rows[rows["cause"] == CAUSES.index("rto")]
        return chosen

    with Tun(lab.server) as far, inside(lab.server), socket.create_server((far.near[4], port)) as listener:
        far.send(4, 40_000, port, SYN)
        seq = far.read()[-1].seq + 1
        far.send(4, 40_000, port, ACK, seq=8, ack_seq=seq)
        with listener.accept()[0] as accepted:
            accepted.sendall(bytes(7))
            wait_for(lambda: len(timeouts()) > 0, "a timeout")
            far.send(4, 40_000, port, ACK, seq=8, ack_seq=seq, window=0)
            before = len(timeouts())
            wait_for(lambda: len(timeouts()) > before, "a retransmission")
            far.send(4, 40_000, port, RST, seq=8)
    rows = timeouts()
    closed = rows["s"]["snd_wnd"] == 0
    assert list(closed) == [False] * before + [True] * (len(rows) - before)
    assert list(rows["retransmit_no"][~closed]) == list(range(1, before + 1))
    assert not (rows["s"]["known"][closed] & KNOWN["retransmit_no"]).any()


def with_options(pair: Pair, version: int) -> None:
    """Let both ends send headers between those of IP and TCP."""
    for end in (pair.client, pair.accepted):
        if version == 4:
            end.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1] * 8))
        else:
            end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))


@pytest.mark.parametrize("version", [4, 6])
def test_headers_between_those_of_ip_and_tcp(capture: Recording, lab: Lab, port: int, version: int) -> None:
    address = lab.server.ipv4 if version == 4 else lab.server.ipv6
    with Trial(capture, lab, port) as trial, Pair(lab.client, lab.server, address, port) as pair:
        with_options(pair, version)
        pair.exchange(3, 997)
        pair.transfer(300_007)
        pair.end()
    assert trial.sent(lab.client)["s"]["payload_len"].sum() >= 300_007 + 3 * 997


def test_all_headers_that_a_socket_can_put_between_those_of_ipv6_and_tcp(
    capture: Recording, lab: Lab, port: int
) -> None:
    """Hop-by-hop options, and a segment routing header with destination options before and after it."""
    options = bytes([0, 0, 1, 4, 0, 0, 0, 0])
    route = struct.pack("!BBBBBBH", 0, 2, 4, 0, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, lab.server.ipv6)
    with contextlib.ExitStack() as stack:
        for interface in ("all", INTERFACE):
            stack.enter_context(setting(lab.server, f"net.ipv6.conf.{interface}.seg6_enabled", 1))
        trial = stack.enter_context(Trial(capture, lab, port))
        pair = stack.enter_context(Pair(lab.client, lab.server, lab.server.ipv6, port))
        for option in (socket.IPV6_HOPOPTS, socket.IPV6_RTHDRDSTOPTS, socket.IPV6_RTHDR, socket.IPV6_DSTOPTS):
            value = route if option == socket.IPV6_RTHDR else options
            pair.client.setsockopt(socket.IPPROTO_IPV6, option, value)
        pair.exchange(3, 997)
        pair.transfer(300_007)
        pair.end()
    assert trial.sent(lab.client)["s"]["payload_len"].sum() >= 300_007 + 3 * 997


def test_super_segments_larger_than_64_kilobytes(capture: Recording, lab: Lab, port: int) -> None:
    lost = f"tcp dport {port} numgen inc mod 19 == 11 drop"
    with contextlib.ExitStack() as stack:
        for host in lab.hosts:
            set_gso(host, 150_000)
            stack.callback(set_gso, host, 65_536)
        trial = stack.enter_context(Trial(capture, lab, port))
        pair = stack.enter_context(Pair(lab.client, lab.server, lab.server.ipv6, port))
        for _ in range(50):
            pair.transfer(10_000_019)
            if trial.sent(lab.client)["s"]["segs"].max() > MAX_SEGS:
                break
        else:
            pytest.fail("the connection never was so fast")
        with rules(lab.server, "prerouting", lost):
            pair.transfer(3_000_017)
        pair.end()
    assert segs(trial.again(lab.client)) > 0


def set_gso(host: Host, size: int) -> None:
    subprocess.run(host.command("ip", "link", "set", INTERFACE, "gso_max_size", str(size)), check=True)
