"""Segments without a full socket, not of TCP, or in transit: which of them are events (docs/truth.md)."""

import contextlib
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from producer.demo.lab import Host, Lab
from producer.events import KNOWN, TRANSMITS, Rows
from tests.support.capture import Pair, Recording, Skips, inside, kernel_version, rules, sees_ipv6_synacks, wait_for
from tests.support.comparison import Trial
from tests.support.tun import Tun

pytestmark = pytest.mark.root

FIN, SYN, RST, ACK = 1, 2, 4, 16
COUNT = 97
_FIRST_PORT = 40_000  # above all ports of the tests
_IPPROTO_MPTCP = 262


@pytest.fixture(scope="module")
def own() -> Iterator[Lab]:
    """Separate namespaces, whose server answers each invalid segment."""
    with Lab(loss=0) as own:
        for setting in ("tcp_invalid_ratelimit=0", "tcp_challenge_ack_limit=2147483647", "ip_forward=1"):
            subprocess.run(own.server.command("sysctl", "-qw", f"net.ipv4.{setting}"), check=True)
        yield own


@pytest.fixture(scope="module")
def host(own: Lab) -> Host:
    return own.server


@pytest.fixture(scope="module")
def far(host: Host) -> Iterator[Tun]:
    with Tun(host) as far:
        yield far


@contextlib.contextmanager
def listening(host: Host, far: Tun, version: int, port: int) -> Iterator[socket.socket]:
    with inside(host):
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        listener = socket.create_server((far.near[version], port), family=family)
    with listener:
        yield listener


def to_closed_port(host: Host, far: Tun, version: int, port: int) -> None:
    for i in range(COUNT):
        far.send(version, _FIRST_PORT + i, port, SYN)


def to_listener(host: Host, far: Tun, version: int, port: int) -> None:
    with listening(host, far, version, port):
        for i in range(COUNT):
            far.send(version, _FIRST_PORT + i, port, ACK, ack_seq=5)


def to_request(host: Host, far: Tun, version: int, port: int) -> None:
    with listening(host, far, version, port):
        far.send(version, _FIRST_PORT, port, SYN)
        first = far.read()[-1].seq
        for i in range(COUNT - 1):
            far.send(version, _FIRST_PORT, port, ACK, seq=8, ack_seq=first + 77 + i)


def beyond_the_window_of_request(host: Host, far: Tun, version: int, port: int) -> None:
    with listening(host, far, version, port):
        far.send(version, _FIRST_PORT, port, SYN)
        first = far.read()[-1].seq
        for _ in range(COUNT - 1):
            far.send(version, _FIRST_PORT, port, ACK, seq=1 << 30, ack_seq=first + 1)


def to_connecting(host: Host, far: Tun, version: int, port: int) -> None:
    """As from a peer that still has an older connection."""
    with inside(host):
        client = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
    with client:
        client.setblocking(False)
        client.connect_ex((far.far[version], port))
        for i in range(COUNT - 1):
            far.send(version, port, client.getsockname()[1], ACK, seq=100, ack_seq=i)


def connected(far: Tun, listener: socket.socket, version: int, port: int) -> tuple[socket.socket, int]:
    """Connect from the far side, and return the accepted socket and its next sequence number."""
    far.send(version, _FIRST_PORT, port, SYN)
    seq = far.read()[-1].seq + 1
    far.send(version, _FIRST_PORT, port, ACK, seq=8, ack_seq=seq)
    return listener.accept()[0], seq


def to_connection(host: Host, far: Tun, version: int, port: int) -> None:
    with listening(host, far, version, port) as listener:
        accepted, _ = connected(far, listener, version, port)
        for i in range(COUNT - 2):
            far.send(version, _FIRST_PORT, port, SYN, seq=5000 + i)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()


def to_time_wait(host: Host, far: Tun, version: int, port: int) -> None:
    with listening(host, far, version, port) as listener:
        accepted, seq = connected(far, listener, version, port)
        with accepted:
            accepted.shutdown(socket.SHUT_WR)
            far.send(version, _FIRST_PORT, port, ACK, seq=8, ack_seq=seq + 1)
            for _ in range(COUNT - 2):
                far.send(version, _FIRST_PORT, port, FIN | ACK, seq=8, ack_seq=seq + 1)


def data_to_time_wait(host: Host, far: Tun, version: int, port: int) -> None:
    """The first data is answered by a reset, which ends the wait; the rest by the listener."""
    with listening(host, far, version, port) as listener:
        accepted, seq = connected(far, listener, version, port)
        accepted.close()
        far.send(version, _FIRST_PORT, port, ACK, seq=8, ack_seq=seq + 1)
        for _ in range(COUNT - 2):
            far.send(version, _FIRST_PORT, port, ACK, seq=8, ack_seq=seq + 1, payload=b"?")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("provoke", "of_sockets", "without_socket"),
    [
        (to_closed_port, 0, COUNT),
        (to_listener, 0, COUNT),
        (to_request, 1, COUNT - 1),
        (beyond_the_window_of_request, 1, COUNT - 1),
        (to_connecting, 1, COUNT - 1),
        (to_connection, COUNT, 0),
        (to_time_wait, 3, 0),
        (data_to_time_wait, 2, COUNT - 3),
    ],
)
def test_segments_without_a_full_socket(
    capture: Recording,
    host: Host,
    far: Tun,
    port: int,
    provoke: Callable[[Host, Tun, int, int], None],
    of_sockets: int,
    without_socket: int,
    version: int,
) -> None:
    if version == 6 and not sees_ipv6_synacks(capture):
        pytest.skip("this kernel does not run cgroup programs for SYN-ACKs over IPv6 (like Linux 6.1)")
    before, wire, skips = host.counters(), len(far.read()), Skips(capture)
    provoke(host, far, version, port)
    sent, kernel = far.read()[wire:], host.counters()
    # If the machine stalled, a SYN-ACK or FIN was sent twice.
    resent = kernel["RetransSegs"] - before["RetransSegs"]
    assert COUNT <= len(sent) <= COUNT + resent
    seen = of_sockets
    if capture.kernel.hooks_in_use["transmit"] == "cgroup_skb" and version == 4:
        seen += without_socket
        if provoke in (to_time_wait, data_to_time_wait) and kernel_version() < (6, 13):
            seen = COUNT
    rows = of_host(capture, host, port)
    assert seen - skips.of(TRANSMITS) <= len(rows) <= seen + resent
    empty = rows[rows["s"]["seq"] == rows["s"]["end_seq"]]
    assert (empty["s"]["known"] & KNOWN["is_retransmit"]).all()
    assert not empty["is_retransmit"].any()


def of_host(capture: Recording, host: Host, port: int) -> Rows:
    rows = capture.of_port(TRANSMITS, port)
    chosen: Rows = rows[rows["s"]["flow"]["netns"] == host.netns]
    return chosen


def test_segments_that_a_process_writes_itself_are_no_events(
    capture: Recording, host: Host, far: Tun, port: int
) -> None:
    before, wire = host.counters()["OutSegs"], len(far.read())
    ends = b"".join(socket.inet_aton(each[4]) for each in (far.near, far.far))
    tcp = struct.pack("!HHIIBBHHH", port, _FIRST_PORT, 1, 1, 5 << 4, RST, 100, 0, 0)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0) + ends
    for protocol, packet in ((socket.IPPROTO_TCP, tcp), (socket.IPPROTO_RAW, header + tcp)):
        with inside(host), socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as raw:
            for _ in range(COUNT):
                raw.sendto(packet, (far.far[4], 0))
    assert len(far.read()) - wire == 2 * COUNT
    assert host.counters()["OutSegs"] == before
    assert len(capture.of_port(TRANSMITS, port)) == 0


def test_the_resets_of_a_packet_filter_are_no_events(capture: Recording, host: Host, far: Tun, port: int) -> None:
    before, wire = host.counters()["OutSegs"], len(far.read())
    with rules(host, "input", f"tcp dport {port} reject with tcp reset"):
        to_closed_port(host, far, 4, port)
    assert len(far.read()) - wire == COUNT
    assert host.counters()["OutSegs"] == before
    assert len(capture.of_port(TRANSMITS, port)) == 0


def test_forwarded_segments_are_their_senders(capture: Recording, own: Lab, far: Tun, port: int) -> None:
    server, client = own.server, own.client
    subprocess.run(client.command("ip", "route", "add", "10.222.0.0/24", "via", server.ipv4), check=True)
    before, wire = server.counters()["OutSegs"], len(far.read())
    with inside(client):
        connecting = socket.socket()
    with connecting:
        connecting.setblocking(False)
        connecting.connect_ex((far.far[4], port))
        wait_for(lambda: len(far.read()) > wire, "the SYN")
    assert server.counters()["OutSegs"] == before
    assert len(of_host(capture, client, port)) >= 1
    assert len(of_host(capture, server, port)) == 0


def test_multipath_tcp_is_seen_once(capture: Recording, lab: Lab, port: int) -> None:
    with Trial(capture, lab, port):
        with inside(lab.server):
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        with inside(lab.client):
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        with listener, client:
            listener.bind((lab.server.ipv4, port))
            listener.listen()
            client.connect((lab.server.ipv4, port))
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(120)
                for _ in range(31):
                    client.sendall(bytes(997))
                    assert len(accepted.recv(997, socket.MSG_WAITALL)) == 997
                client.close()
                assert accepted.recv(1) == b""
    assert capture.of_port(TRANSMITS, port)["s"]["payload_len"].sum() >= 31 * 997


def ip(host: Host, *argv: str) -> None:
    subprocess.run(host.command("ip", *argv), check=True)


def test_a_tunnel_adds_no_events(capture: Recording, lab: Lab, port: int) -> None:
    ends = dict(zip(lab.hosts, (("10.223.0.1", lab.server), ("10.223.0.2", lab.client)), strict=True))
    with contextlib.ExitStack() as stack:
        for host, (address, other) in ends.items():
            run = partial(ip, host)
            run("link", "add", "tunnel0", "type", "vxlan", "id", "7", "remote", other.ipv4, "dstport", "4789")
            stack.callback(run, "link", "delete", "tunnel0")
            run("address", "add", f"{address}/24", "dev", "tunnel0")
            run("link", "set", "tunnel0", "up")
        before, skips = {host.name: host.counters() for host in lab.hosts}, Skips(capture)
        with Pair(lab.client, lab.server, "10.223.0.2", port) as pair:
            pair.exchange(31, 997)
            pair.end()
        assert lab.wait_idle(120)
    # A busy machine may retransmit, and a repeated FIN is answered from time wait.
    resent = sum(host.counters()["RetransSegs"] - before[host.name]["RetransSegs"] for host in lab.hosts)
    for host in lab.hosts:
        segments = int(of_host(capture, host, port)["s"]["segs"].sum())
        moved = host.counters()["OutSegs"] - before[host.name]["OutSegs"]
        assert abs(segments - moved) <= resent + skips.of(TRANSMITS)
