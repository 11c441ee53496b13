"""struct tcp_info of a socket: the state that `ss -ti` prints, by the events' field names."""

import socket
import struct
from dataclasses import dataclass

# From the kernel's include/uapi/linux/tcp.h: behind eight bytes, u32 each.
_FIELDS = (
    *("rto", "ato", "snd_mss", "rcv_mss", "unacked", "sacked", "lost", "retrans", "fackets"),
    *("last_data_sent", "last_ack_sent", "last_data_recv", "last_ack_recv", "pmtu", "rcv_ssthresh"),
    *("rtt", "rttvar", "snd_ssthresh", "snd_cwnd", "advmss", "reordering", "rcv_rtt", "rcv_space", "total_retrans"),
)
_AT_FIELDS, _AT_SEGS, _AT_WINDOWS = 8, 136, 228
# The event's name of each.
_TCP = {
    "srtt_us": "rtt",
    "mdev_us": "rttvar",
    "rto_us": "rto",
    "snd_cwnd": "snd_cwnd",
    "snd_ssthresh": "snd_ssthresh",
    "packets_out": "unacked",
    "sacked_out": "sacked",
    "lost_out": "lost",
    "retrans_out": "retrans",
    "total_retrans": "total_retrans",
    "mss": "snd_mss",
}


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """`tcp` has the events' fields in their units; the segments are those that the socket has sent and received."""

    state: int
    ca_state: int
    tcp: dict[str, int]
    segs_out: int
    segs_in: int


def tcp_info(end: socket.socket) -> TcpInfo:
    """Read TCP_INFO, without windows that this kernel does not report (rcv_wnd before Linux 6.2)."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
    state, ca_state = info[:2]
    values = dict(zip(_FIELDS, struct.unpack_from(f"={len(_FIELDS)}I", info, _AT_FIELDS), strict=True))
    tcp = {name: values[theirs] for name, theirs in _TCP.items()}
    for i, window in enumerate(("snd_wnd", "rcv_wnd")):
        if len(info) >= _AT_WINDOWS + 4 * (i + 1):
            (tcp[window],) = struct.unpack_from("=I", info, _AT_WINDOWS + 4 * i)
    segs_out, segs_in = struct.unpack_from("=2I", info, _AT_SEGS)
    return TcpInfo(state, ca_state, tcp, segs_out, segs_in)
