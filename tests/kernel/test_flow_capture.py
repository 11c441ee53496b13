"""Records of connections, compared with a packet capture at each end, and with `ss -ti`."""

import re
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import FLOWS, KNOWN, REASONS, ROLES, Rows
from tests.support.capture import DEADLINE_S, Pair, Recording, inside, rules, wait_for
from tests.support.comparison import ACK, FIN, INTERFACE, SYN, marked, text_of
from tests.support.wire import Packet, sniffed

pytestmark = pytest.mark.root

Ends = tuple[str, int, str, int]


@dataclass(slots=True)
class Side:
    """What passed one end of a connection; packets that were sent before are `again`."""

    sent: list[tuple[Packet, bool]] = field(default_factory=list)
    received: list[Packet] = field(default_factory=list)

    @property
    def repeats(self) -> bool:
        """Whether something was retransmitted: without loss, the machine stood still."""
        return any(again for _, again in self.sent)

    def time_sent(self, tcp_flags: int) -> int:
        """Return when the first packet with these flags left."""
        return next(packet.ts_ns for packet, _ in self.sent if packet.segment.tcp_flags == tcp_flags)

    def time_received(self, tcp_flags: int) -> int:
        """Return when the first packet with these flags arrived."""
        return next(packet.ts_ns for packet in self.received if packet.segment.tcp_flags == tcp_flags)


@contextmanager
def sides(lab: Lab, port: int) -> Iterator[dict[Ends, Side]]:
    """Capture at both hosts; yield the sides of the connections by their ends, filled when the context is left."""
    found: dict[Ends, Side] = defaultdict(Side)
    with ExitStack() as stack:
        wires = []
        for host in lab.hosts:
            with inside(host):
                wires.append(stack.enter_context(sniffed(port, INTERFACE, incoming=True)))
        yield found
        assert lab.wait_idle(DEADLINE_S)
    for wire in wires:
        outgoing = [packet for packet in wire if packet.outgoing]
        for packet, sent in zip(outgoing, marked(outgoing), strict=True):
            found[packet.segment[:4]].sent.append((packet, sent.again))
        for packet in wire:
            if not packet.outgoing:
                saddr, sport, daddr, dport = packet.segment[:4]
                found[daddr, dport, saddr, sport].received.append(packet)


def ends_of(row: np.void) -> Ends:
    flow = row["flow"]
    return text_of(bytes(flow["saddr"])), int(flow["sport"]), text_of(bytes(flow["daddr"])), int(flow["dport"])


def account(side: Side, *, lossless: bool) -> dict[str, int]:
    """Return what a closing record should have, by the capture alone, if both sides have sent a FIN.

    A server sends its SYN-ACKs before it has a socket; their retransmissions are in total_retrans, and the SYN is in
    segs_in. What repeats the last acknowledgement is sent from time wait, without a socket.
    """
    counted: Counter[str] = Counter()
    last_acks = 0
    fin = next(packet.segment for packet, _ in side.sent if packet.segment.tcp_flags & FIN)
    end = (fin.seq + fin.payload_len + 1) % (1 << 32)
    peers_fin = next(packet.segment for packet in side.received if packet.segment.tcp_flags & FIN)
    peers_end = (peers_fin.seq + peers_fin.payload_len + 1) % (1 << 32)
    for packet, again in side.sent:
        segment = packet.segment
        counted["total_retrans"] += packet.segs * again
        if segment.tcp_flags & (SYN | ACK) == SYN | ACK:
            continue
        last_acks += (segment.seq, segment.ack_seq, segment.tcp_flags) == (end, peers_end, ACK)
        if last_acks > 1 and (segment.seq, segment.ack_seq) == (end, peers_end):
            continue
        counted["segs_out"] += packet.segs
        counted["data_segs_out"] += packet.segs * bool(segment.payload_len)
        counted["bytes_sent"] += segment.payload_len
        counted["bytes_retrans"] += segment.payload_len * again
    first = side.sent[0][0].segment
    counted["bytes_acked"] = (end - first.seq - bool(first.tcp_flags & ACK)) % (1 << 32)
    peers_first = side.received[0].segment
    counted["bytes_received"] = (peers_end - peers_first.seq - 1) % (1 << 32)
    if lossless:
        counted["segs_in"] = sum(packet.segs for packet in side.received)
        counted["data_segs_in"] = sum(packet.segs for packet in side.received if packet.segment.payload_len)
    return dict(counted)


def rows_of(recording: Recording, port: int, reason: str) -> Rows:
    rows = recording.of_port(FLOWS, port)
    chosen: Rows = rows[rows["reason"] == REASONS.index(reason)]
    return chosen


@pytest.mark.parametrize("percent", [0, 4], ids=["lossless", "lossy"])
def test_a_closing_record_has_what_was_on_the_wire(flows: Recording, lab: Lab, port: int, percent: int) -> None:
    addresses = (lab.server.ipv4, lab.server.ipv6, f"::ffff:{lab.server.ipv4}")
    with ExitStack() as stack:
        for host in lab.hosts if percent else ():
            drop = f"tcp sport {port} drop" if host is lab.client else f"tcp dport {port} drop"
            drop = drop.replace("drop", f"numgen random mod 100 < {percent} drop")
            stack.enter_context(rules(host, "prerouting", drop))
        wire = stack.enter_context(sides(lab, port))
        for number in range(31):
            with Pair(lab.client, lab.server, addresses[number % 3], port) as pair:
                pair.exchange(3, 997)
                if number % 10 == 0:
                    pair.transfer(3_000_017)
                pair.end()
    rows = rows_of(flows, port, "close")
    # Some hosts run no program in softirqs that interrupt process 1: docs/truth.md.
    assert 2 * 31 - 1 <= len(rows) <= 2 * 31
    for row in rows:
        saddr, sport, daddr, dport = ends = ends_of(row)
        peer = wire[daddr, dport, saddr, sport]
        expected = account(wire[ends], lossless=not percent and not wire[ends].repeats and not peer.repeats)
        assert {name: int(row[name]) for name in expected} == expected
    assert rows["total_retrans"].sum() > 0 or not percent


@pytest.mark.parametrize("version", [4, 6])
def test_connect_time_and_round_trip_are_those_of_the_handshake(
    flows: Recording, lab: Lab, port: int, version: int
) -> None:
    """Each is at least what passed between the packets, and at most what passed around them."""
    with sides(lab, port) as wire:
        start_ns = time.time_ns()
        with Pair(lab.client, lab.server, lab.server.ipv4 if version == 4 else lab.server.ipv6, port) as pair:
            end_ns = time.time_ns()
            flows.kernel.report_flows()
            rows = rows_of(flows, port, "interval")
            pair.end()
    if any(side.repeats for side in wire.values()):
        pytest.skip("the machine stood still, so that a round trip is not known")
    assert sorted(ROLES[row["role"]] for row in rows) == ["client", "server"]
    for row in rows:
        side = wire[ends_of(row)]
        is_client = ROLES[row["role"]] == "client"
        sent, answer = (SYN, SYN | ACK) if is_client else (SYN | ACK, ACK)
        least_us = (side.time_received(answer) - side.time_sent(sent)) // 1000 - 1
        most_us = (end_ns - start_ns) // 1000 + 1
        assert least_us <= row["srtt_us"] <= most_us
        assert row["min_rtt_us"] == row["srtt_us"]
        if is_client:
            assert row["known"] & KNOWN["connect_us"]
            assert least_us <= row["connect_us"] <= most_us


def test_connect_time_includes_a_lost_syn(flows: Recording, lab: Lab, port: int) -> None:
    lost = f"tcp dport {port} tcp flags & (syn|ack) == syn numgen inc mod 997 == 0 drop"
    with sides(lab, port) as wire:
        start_ns = time.time_ns()
        with rules(lab.server, "prerouting", lost), Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            end_ns = time.time_ns()
            pair.end()
    rows = rows_of(flows, port, "close")
    (row,) = rows[rows["role"] == ROLES.index("client")]
    side = wire[ends_of(row)]
    assert side.time_received(SYN | ACK) - side.time_sent(SYN) > 900_000_000
    least_us = (side.time_received(SYN | ACK) - side.time_sent(SYN)) // 1000 - 1
    assert least_us <= row["connect_us"] <= (end_ns - start_ns) // 1000 + 1


_SAME_IN_SS = (
    *("bytes_sent", "bytes_retrans", "bytes_acked", "bytes_received", "segs_out", "segs_in", "data_segs_out"),
    *("data_segs_in", "delivered", "dsack_dups", "reord_seen", "rcv_ooopack", "snd_wnd", "mss"),
)
_IN_SS = re.compile(r"(\w+)[: ]([\d.]+)(?:/([\d.]+))?(?:ms|bps|\b)")


def of_ss(host: Host, port: int) -> dict[str, Any]:
    """Return the fields of a record that `ss` shows of the only connection of a port. It leaves zeros out."""
    ss = ("ss", "-tinOH", "state", "established", f"( sport = :{port} or dport = :{port} )")
    shown = subprocess.check_output(host.command(*ss), text=True)
    (line,) = shown.splitlines()
    found = {name: (value, other) for name, value, other in _IN_SS.findall(line)}
    values: dict[str, Any] = {name: int(found.get(name, ("0", ""))[0]) for name in _SAME_IN_SS}
    values["srtt_us"], values["mdev_us"] = (round(float(each) * 1000) for each in found["rtt"])
    values["rto_us"], values["min_rtt_us"] = (round(float(found[name][0]) * 1000) for name in ("rto", "minrtt"))
    values["snd_cwnd"] = int(found["cwnd"][0])
    values["snd_ssthresh"] = int(found["ssthresh"][0]) if "ssthresh" in found else None
    values["total_retrans"] = int(found["retrans"][1]) if "retrans" in found else 0
    for name in ("pacing_rate", "delivery_rate"):
        values[name] = int(found[name][0]) // 8
    for name in ("busy", "rwnd_limited", "sndbuf_limited"):
        values[name] = int(found[name][0]) if name in found else 0
    return values


def of_record(row: np.void, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same fields of a record."""
    times = {"busy": "busy_time_us", "rwnd_limited": "rwnd_limited_us", "sndbuf_limited": "sndbuf_limited_us"}
    values = {name: int(row[times[name]]) // 1000 if name in times else int(row[name]) for name in shown}
    if shown["snd_ssthresh"] is None:
        assert values["snd_ssthresh"] >= 0x7FFFFFFF
        values["snd_ssthresh"] = None
    return values


def test_the_record_of_an_open_connection_is_what_ss_shows(flows: Recording, lab: Lab, port: int) -> None:
    lost = f"tcp dport {port} numgen inc mod 7 == 3 drop"
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        with rules(lab.server, "prerouting", lost):
            pair.transfer(1_000_003)
        pair.exchange(3, 211)

        def at_rest() -> list[tuple[dict[str, Any], np.void]] | None:
            """Return both ends, if nothing has changed between what ss shows before and after the records."""
            before = [of_ss(host, port) for host in lab.hosts]
            count = len(rows_of(flows, port, "interval"))
            flows.kernel.report_flows()
            rows = rows_of(flows, port, "interval")[count:]
            if [of_ss(host, port) for host in lab.hosts] != before:
                return None
            by_netns = {int(row["flow"]["netns"]): row for row in rows}
            return [(shown, by_netns[host.netns]) for shown, host in zip(before, lab.hosts, strict=True)]

        found = wait_for(at_rest, "a connection at rest")
        pair.end()
    for shown, row in found:
        assert of_record(row, shown) == shown
    assert found[0][0]["total_retrans"] > 0
