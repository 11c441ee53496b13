"""A trial: traffic of one port in the lab, and three accounts of it, which must match.

The accounts are the events, the namespaces' counters, and a packet capture on each host's interface.
"""

import contextlib
import ipaddress
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from producer.demo.lab import Host, Lab
from producer.events import CAUSES, KNOWN, RETRANSMITS, STREAMS, TRANSMITS, Rows, Stream
from tests.support.capture import DEADLINE_S, Recording, Skips, inside, sees_ipv6_synacks
from tests.support.wire import Packet, Segment, sniffed

INTERFACE = "veth0"
FIN, SYN, RST, PSH, ACK, ECE, CWR = 1, 2, 4, 8, 16, 64, 128
MAX_SEGS = 46  # of one event: 64 KiB in segments of 1,448 bytes
COUNTED_CAUSES = {
    "RetransSegs": CAUSES,
    "TCPFastRetrans": ("fast",),
    "TCPSlowStartRetrans": ("slow_start",),
    "TCPSynRetrans": ("syn", "syn_ack"),
}
_Flow = tuple[str, int, str, int]


class Sent(NamedTuple):
    """A packet, and whether its data was sent before, according to an event or to the capture."""

    segment: Segment
    segs: int
    end_seq: int
    again: bool


def cause_is(rows: Rows, *causes: str) -> Rows:
    """Select retransmits by cause."""
    chosen: Rows = rows[np.isin(rows["cause"], [CAUSES.index(cause) for cause in causes])]
    return chosen


def segs(rows: Rows) -> int:
    """Sum the segments, as the kernel counts them."""
    return int(rows["s"]["segs"].sum())


class Trial:
    """Records the accounts of the context, and compares them on exit.

    `whole`: super-segments leave the interface as they are, and not cut. `resets`: a reset may lack its event.
    `given_up`: the most timeouts that end a connection and send nothing.
    """

    def __init__(
        self, capture: Recording, lab: Lab, port: int, *, whole: bool = True, resets: bool = False, given_up: int = 0
    ) -> None:
        self._capture = capture
        self._lab = lab
        self._port = port
        self._whole = whole
        self._resets = resets
        self._given_up = given_up
        self._wire: dict[str, list[Packet]] = {}
        self._stack = contextlib.ExitStack()
        self.socketless: dict[str, list[Segment]] = {}
        """By host, packets of the capture without an event (see docs/truth.md)."""
        self._unseen_syn_acks: dict[str, list[Sent]] = {}
        """By host, SYN-ACKs over IPv6 for which the kernel does not run the hook."""

    def __enter__(self) -> Self:
        assert self._lab.wait_idle(DEADLINE_S)
        self._before = {host.name: host.counters() for host in self._lab.hosts}
        self._start = {stream.name: len(self._capture.of_port(stream, self._port)) for stream in STREAMS}
        self._skips = Skips(self._capture)
        with self._stack as stack:
            for host in self._lab.hosts:
                with inside(host):
                    self._wire[host.name] = stack.enter_context(sniffed(self._port, INTERFACE))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        idle = kind is not None or self._lab.wait_idle(DEADLINE_S)
        self._stack.close()
        assert idle
        if kind is None:
            for host in self._lab.hosts:
                self._check_wire(host)
                self._check_counters(host)

    @property
    def hook(self) -> str:
        """The transmit stream's hook; retransmits use the same, or one together with it."""
        return self._capture.kernel.hooks_in_use["transmit"]

    def moved(self, host: Host, name: str) -> int:
        """Return the increase of a counter of the host since the trial began."""
        return host.counters()[name] - self._before[host.name][name]

    def may_miss(self, stream: Stream) -> range:
        """Return the numbers of the stream's events that may be missing, because the kernel skipped runs."""
        return range(self._skips.of(stream) + 1)

    def sent(self, host: Host) -> Rows:
        """Return the transmit events of a host."""
        return self._rows(TRANSMITS, host)

    def again(self, host: Host, *causes: str) -> Rows:
        """Return the retransmit events of a host, of some causes or all."""
        rows = self._rows(RETRANSMITS, host)
        return cause_is(rows, *causes) if causes else rows

    def _rows(self, stream: Stream, host: Host) -> Rows:
        rows = self._capture.of_port(stream, self._port)[self._start[stream.name] :]
        chosen: Rows = rows[rows["s"]["flow"]["netns"] == host.netns]
        return chosen

    def _check_wire(self, host: Host) -> None:
        rows = self.sent(host)
        recorded = _mark_syn_acks(_sent(rows, rows["is_retransmit"] == 1))
        wire = [self._as_told(packet) for packet in self._wire[host.name]]
        if not self._whole:
            wire = list(_joined(wire, recorded))
        seen = list(marked(wire))
        invented = _difference(recorded, seen)
        assert not invented, f"events without a packet: {invented[:3]}; packets: {_difference(seen, recorded)[:3]}"
        lacking = _difference(seen, recorded)
        unseen = set() if sees_ipv6_synacks(self._capture) else set(filter(_is_ipv6_syn_ack, lacking))
        self._unseen_syn_acks[host.name] = [each for each in lacking if each in unseen]
        seen, lacking = ([each for each in some if each not in unseen] for some in (seen, lacking))
        ends = _ends(packet.segment for wire in self._wire.values() for packet in wire)
        unexplained = [
            each
            for each in lacking
            if not _is_of_time_wait(each.segment, ends) and not (self._resets and each.segment.tcp_flags & RST)
        ]
        pieces = 1 if self._whole else MAX_SEGS
        assert len(unexplained) <= pieces * self._skips.of(TRANSMITS), f"packets without an event: {unexplained[:3]}"
        self.socketless[host.name] = [each.segment for each in lacking if each not in unexplained]
        rows = self.again(host)
        recorded, seen = _sent(rows, np.ones(len(rows), bool)), [each for each in seen if each.again]
        assert not (invented := _difference(recorded, seen)), f"retransmits without a packet: {invented[:3]}"
        lacking = _difference(seen, recorded)
        assert len(lacking) <= pieces * self._skips.of(RETRANSMITS), (
            f"retransmitted packets without an event: {lacking[:3]}"
        )

    def _as_told(self, packet: Packet) -> Packet:
        """Drop what the hook cannot provide: fentry and kprobe see the flags without ECN's."""
        if self.hook == "cgroup_skb":
            return packet
        segment = packet.segment
        return packet._replace(segment=segment._replace(tcp_flags=segment.tcp_flags & ~(ECE | CWR)))

    def _check_counters(self, host: Host) -> None:
        sent, again = self.sent(host), self.again(host)
        assert (again["err"] == 0).all()
        assert not len(cause_is(again, "other"))
        missing = {stream.name: range(MAX_SEGS * self._skips.of(stream) + 1) for stream in STREAMS}
        unseen = self._unseen_syn_acks[host.name]
        unseen_again = sum(each.again for each in unseen)
        for name, causes in COUNTED_CAUSES.items():
            recorded = segs(cause_is(again, *causes)) + unseen_again * ("syn_ack" in causes)
            assert self.moved(host, name) - recorded in missing["retransmit"], f"{name}: {recorded} by the events"
        # A probe may also be new data. A timeout may find the segment still in the host's queue, or belong to a
        # SYN-ACK, which a repeated SYN has also retransmitted.
        assert segs(cause_is(again, "tlp")) <= self.moved(host, "TCPLossProbes")
        timeouts = self.moved(host, "TCPTimeouts") - segs(cause_is(again, "rto", "syn"))
        queued = self.moved(host, "TCPSpuriousRtxHostQueues")
        syn_acks = segs(cause_is(again, "syn_ack"))
        silent = syn_acks + unseen_again + queued + self._given_up
        assert 0 <= timeouts <= silent + missing["retransmit"].stop - 1, f"TCPTimeouts: {timeouts} without an event"

        marked = segs(sent[sent["is_retransmit"] == 1])
        if not (sent["s"]["known"][sent["s"]["tcp_flags"] == SYN | ACK] & KNOWN["is_retransmit"]).all():
            marked += syn_acks
        assert self.moved(host, "RetransSegs") - marked - unseen_again in missing["transmit"], (
            f"RetransSegs: {marked} by the transmits"
        )
        # tcp_make_synack counts each SYN-ACK in OutSegs, including retransmitted ones.
        without_event = len(self.socketless[host.name]) + len(unseen)
        first = segs(sent) - marked + syn_acks + without_event - self._answers_to_syns(host)
        assert self.moved(host, "OutSegs") - first in missing["transmit"], f"OutSegs: {first} by the transmits"

    def _answers_to_syns(self, host: Host) -> int:
        """Count the first SYN-ACKs of connections that both sides open at once: the kernel counts them nowhere."""
        wire = [packet.segment for packet in self._wire[host.name]]
        syns = {segment[:5] for segment in wire if segment.tcp_flags & (SYN | ACK) == SYN}
        return len({segment[:5] for segment in wire if segment.tcp_flags & (SYN | ACK) == SYN | ACK} & syns)


def _difference(some: Iterable[Sent], others: Iterable[Sent]) -> list[Sent]:
    return list((Counter(some) - Counter(others)).elements())


def _length(segment: Segment) -> int:
    """Return by how much the segment advances the sequence number."""
    return segment.payload_len + bool(segment.tcp_flags & SYN) + bool(segment.tcp_flags & FIN)


def _sent(rows: Rows, again: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[Sent]:
    s = rows["s"]
    columns = (s[name].tolist() for name in ("seq", "ack_seq", "tcp_flags", "payload_len", "segs", "end_seq"))
    flows = (
        (text_of(bytes(flow["saddr"])), int(flow["sport"]), text_of(bytes(flow["daddr"])), int(flow["dport"]))
        for flow in s["flow"]
    )
    return [
        Sent(Segment(*flow, *segment), segs, end_seq, before)
        for flow, *segment, segs, end_seq, before in zip(flows, *columns, again.tolist(), strict=True)
    ]


def text_of(address: bytes) -> str:
    """Return an address of an event as the capture writes it."""
    parsed = ipaddress.IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed)


def _mark_syn_acks(recorded: Iterable[Sent]) -> list[Sent]:
    """Mark SYN-ACKs that were sent before, by their sequence numbers, since not all hooks can."""
    syn_acks: set[Segment] = set()
    marked = []
    for sent in recorded:
        if sent.segment.tcp_flags & (SYN | ACK) == SYN | ACK:
            marked.append(sent._replace(again=sent.again or sent.segment in syn_acks))
            syn_acks.add(sent.segment)
        else:
            marked.append(sent)
    return marked


def marked(wire: Iterable[Packet]) -> Iterator[Sent]:
    """Mark what was sent before, from the capture alone: segments that begin below the end of their flow.

    A SYN-ACK after a SYN, when both sides open the connection, is the first one.
    """
    reached: dict[_Flow, int] = {}
    syn_acks: set[_Flow] = set()
    for packet in wire:
        segment = packet.segment
        flow, length = segment[:4], _length(segment)
        end_seq = (segment.seq + length) % (1 << 32)
        highest = reached.get(flow, segment.seq)
        again = bool(length) and _before(segment.seq, highest)
        if segment.tcp_flags & (SYN | ACK) == SYN | ACK:
            again = again and flow in syn_acks
            syn_acks.add(flow)
        yield Sent(segment, packet.segs, end_seq, again)
        reached[flow] = end_seq if _before(highest, end_seq) else highest


def _ends(wire: Iterable[Segment]) -> dict[_Flow, int]:
    """Return where each flow that sent a FIN ends."""
    fins = (segment for segment in wire if segment.tcp_flags & FIN)
    return {segment[:4]: (segment.seq + _length(segment)) % (1 << 32) for segment in fins}


def _is_of_time_wait(segment: Segment, ends: dict[_Flow, int]) -> bool:
    """Whether it only acknowledges the other side's FIN, after its own: as TCP does without a socket."""
    saddr, sport, daddr, dport, seq, ack_seq, tcp_flags, payload_len = segment
    ended = (ends.get((saddr, sport, daddr, dport)), ends.get((daddr, dport, saddr, sport))) == (seq, ack_seq)
    return ended and (tcp_flags, payload_len) == (ACK, 0)


def _is_ipv6_syn_ack(sent: Sent) -> bool:
    return ":" in sent.segment.saddr and sent.segment.tcp_flags & (SYN | ACK) == SYN | ACK


def _before(one: int, other: int) -> bool:
    return (one - other) % (1 << 32) >= 1 << 31


def _joined(wire: Iterable[Packet], recorded: Iterable[Sent]) -> Iterator[Packet]:
    """Merge the packets of a super-segment: as many as its event's `segs`, in order."""
    packets: dict[_Flow, list[Packet]] = defaultdict(list)
    for packet in wire:
        packets[packet.segment[:4]].append(packet)
    for sent in recorded:
        mine, seq = packets[sent.segment[:4]], sent.segment.seq
        while any(each.segment.seq == seq for each in mine[1:]) and mine[0].segment.seq != seq:
            yield mine.pop(0)  # of a skipped event
        taken, mine[: sent.segs] = mine[: sent.segs], []
        if not taken:
            continue
        pieces = [each.segment for each in taken]
        for one, other in itertools.pairwise(pieces):
            assert (one.seq + one.payload_len) % (1 << 32) == other.seq, "pieces of one super-segment"
            assert one.ack_seq == other.ack_seq
            assert not one.tcp_flags & (PSH | FIN), "these are only on the last piece"
        whole = pieces[0]._replace(
            payload_len=sum(piece.payload_len for piece in pieces),
            tcp_flags=pieces[0].tcp_flags | pieces[-1].tcp_flags,
        )
        yield taken[0]._replace(segment=whole, segs=sum(each.segs for each in taken))
    for left in packets.values():
        yield from left
