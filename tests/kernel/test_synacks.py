"""Unanswered SYNs: each SYN-ACK that is sent again is an event, however many requests there are at once."""

import contextlib
import ipaddress
import socket
import struct
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from producer.events import CAUSES, KNOWN, RETRANSMITS, TRANSMITS
from producer.lab import Host, Lab
from producer.rules import filtered
from tests.kernel.capture import Capture, Skips, hook_settings, inside, rules, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

SYN, ACK = 2, 16
_FIRST_PORT = 20_000


@pytest.fixture
def crowd() -> Iterator[Lab]:
    """Namespaces of their own, whose server takes 65,535 requests at once and answers them without SYN cookies."""
    with Lab(loss=0) as lab:
        for setting in ("core.somaxconn=65535", "ipv4.tcp_max_syn_backlog=65535", "ipv4.tcp_syncookies=0"):
            subprocess.run(lab.server.command("sysctl", "-qw", f"net.{setting}"), check=True)
        yield lab


@pytest.fixture
def roomy(port: int) -> Iterator[Capture]:
    """Hooks of their own, whose rings hold all that a crowd brings even if nobody reads them meanwhile."""
    rings = {"transmit_pipe": 1 << 26, "retransmit_pipe": 1 << 26}
    with Capture(hook_settings(rules=filtered(ports=(port,)), ring_bytes=rings)) as capture:
        yield capture


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def send_syns(client: Host, server: Host, port: int, count: int) -> None:
    """Send SYNs from as many ports, for which the client has no sockets."""
    ends = b"".join(ipaddress.ip_address(each.ipv4).packed for each in (client, server))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0) + ends
    pseudo = ends + struct.pack("!HH", socket.IPPROTO_TCP, 20)
    with inside(client):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        for sport in range(_FIRST_PORT, _FIRST_PORT + count):
            start, end = struct.pack("!HHIIBBH", sport, port, 7, 0, 5 << 4, SYN, 65_535), b"\0\0"
            total = struct.pack("!H", checksum(pseudo + start + b"\0\0" + end))
            raw.sendto(ip + start + total + end, (server.ipv4, 0))


@pytest.mark.parametrize("count", [3_001, 30_011])
def test_each_syn_ack_that_is_sent_again_is_an_event(roomy: Capture, crowd: Lab, port: int, count: int) -> None:
    client, server = crowd.hosts
    skips = Skips(roomy)
    lost = f"tcp sport {port} drop"
    with rules(client, "prerouting", lost), contextlib.ExitStack() as listening:
        with inside(server):
            listening.enter_context(socket.create_server((server.ipv4, port), backlog=65_535))
        send_syns(client, server, port, count)
        # They come in bursts, of which the other host's backlog drops a part: the kernel does not count those.
        wait_for(lambda: server.counters()["TCPSynRetrans"] >= count // 3, "SYN-ACKs to be sent again")
    # The requests ended with their listener: from here on, nothing is sent.
    may_miss = {stream: skips.of(stream) for stream in (TRANSMITS, RETRANSMITS)}
    kernel = server.counters()
    again = roomy.of_port(RETRANSMITS, port)
    assert kernel["TCPSynRetrans"] == kernel["RetransSegs"]
    assert set(again["cause"]) == {CAUSES.index("syn_ack")}
    assert 0 <= kernel["TCPSynRetrans"] - len(again) <= may_miss[RETRANSMITS]
    assert (again["retransmit_no"] >= 1).all()

    sent = roomy.of_port(TRANSMITS, port)
    sent = sent[sent["s"]["tcp_flags"] == SYN | ACK]
    assert 0 <= kernel["OutSegs"] - len(sent) <= may_miss[TRANSMITS]
    if roomy.hooks.rungs["transmit"] == "cgroup_skb":
        assert (sent["s"]["known"] & KNOWN["is_retransmit"]).all()
        _, first = np.unique(sent["s"]["flow"]["dport"], return_index=True)
        assert set(np.flatnonzero(sent["is_retransmit"] == 0)) == set(first)
        assert int(sent["is_retransmit"].sum()) >= kernel["TCPSynRetrans"]
