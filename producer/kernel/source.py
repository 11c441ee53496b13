"""The C that one host compiles: the files of bpf/ joined, with the running kernel's layouts and the chosen rungs. Pure
text.

bcc rewrites map accesses in its main file only, so that the local headers cannot stay `#include`s: they are put in
place, with #line, so that a compiler's message names the file that a reader knows. Standard library only.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from producer.errors import UnavailableError
from producer.kernel.btf import FUNC, TYPEDEF, Btf, kernel_header, missing

# What the programs read, by the struct that a pointer to it has in the verifier's eyes. A path may reach into nested
# structs.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "net": ("ns.inum as ns_inum",),
    "sock_common": ("skc_family", "skc_num", "skc_dport", "skc_daddr", "skc_rcv_saddr"),
    "sock": ("__sk_common.skc_net.net as skc_net", "__sk_common.skc_state"),
    "tcp_sock": ("rcv_nxt", "snd_nxt", "inet_conn.icsk_inet.inet_sport"),
    "tcp_request_sock": ("snt_isn", "rcv_nxt"),
    "sk_buff": ("cb",),
    "tcp_skb_cb": ("seq", "end_seq", "tcp_gso_segs", "tcp_flags"),
}
# Where the kernel has no such member, what it would tell is unknown, and the field is null.
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "kernfs_node": ("id",),
    "cgroup": ("kn", "level", "ancestors", "ancestor_ids"),  # ancestors since Linux 6.1, ancestor_ids before
    "sock_common": (
        "skc_v6_daddr.in6_u.u6_addr32 as skc_v6_daddr",
        "skc_v6_rcv_saddr.in6_u.u6_addr32 as skc_v6_rcv_saddr",
    ),
    "sock": (
        "__sk_common.skc_cookie.counter as skc_cookie",
        "sk_uid.val as sk_uid",
        "__sk_common.skc_node.pprev as skc_node_pprev",
        "sk_cgrp_data.cgroup as sk_cgroup",  # Linux 5.15
    ),
    "tcp_sock": (
        "inet_conn.icsk_ca_state",
        "inet_conn.icsk_pending",
        "inet_conn.icsk_retransmits",
        "inet_conn.icsk_rto",
        "srtt_us",
        "mdev_us",
        "snd_cwnd",
        "snd_ssthresh",
        "packets_out",
        "sacked_out",
        "lost_out",
        "retrans_out",
        "total_retrans",
        "snd_wnd",
        "rcv_wnd",
        "mss_cache",
        "tcp_tx_delay",
        "fastopen_rsk",
    ),
    "request_sock": ("num_retrans",),
    "tcp_request_sock": ("snt_synack",),
    # x86-64 and arm64; kprobes only.
    "pt_regs": ("di", "si", "dx", "cx", "r8", "ax", "sp", "regs"),
}
WANTED = {
    struct: REQUIRED.get(struct, ()) + OPTIONAL.get(struct, ()) for struct in dict.fromkeys([*REQUIRED, *OPTIONAL])
}

_RUNGS = (
    "TRANSMIT_FENTRY",
    "TRANSMIT_KPROBE",
    "TRANSMIT_CGROUP_SKB",
    "RETRANSMIT_FENTRY",
    "RETRANSMIT_KPROBE",
    "RETRANSMIT_CGROUP_SKB",
    "RETRANSMIT_RAW_TP",
)


def program_text(folder: Path, btf: Btf, layout_check: str) -> str:
    """Return the whole C source; `layout_check` is C that compares events.h with what the agent expects."""
    if lacking := missing(btf, REQUIRED):
        raise UnavailableError(f"this kernel's structs are not those that ReBPF knows; missing: {', '.join(lacking)}")
    generated = {"kernel.h": kernel_header(btf, WANTED), "layout_check.h": layout_check}
    return _inline(folder, "rebpf.bpf.c", generated)


def macros(btf: Btf, rungs: Mapping[str, str], hz: int) -> list[str]:
    """Return compiler flags: the rung's name by stream, and the kernel's HZ."""
    chosen = {f"{stream}_{rung}".upper() for stream, rung in rungs.items()}
    tracepoint = btf.find(TYPEDEF, "btf_trace_tcp_retransmit_skb")
    numbers = {
        **{name: int(name in chosen) for name in _RUNGS},
        # One compilation holds both streams: pointers have BTF types unless one of them is taken by kprobes.
        "PROBE_READ": int("kprobe" in rungs.values()),
        # A tracepoint's typedef has the data pointer first.
        "RETRANSMIT_TRACEPOINT_HAS_ERR": int(tracepoint is not None and btf.params(tracepoint) > 3),
        # Who counts a SYN-ACK's retransmission in its request: the caller of tcp_rtx_synack, or since Linux 6.17
        # itself.
        "SYNACK_COUNTED_BY_CALLER": int(btf.find(FUNC, "inet_rtx_syn_ack") is not None),
        "HZ": hz,
    }
    return [f"-D{name}={value}" for name, value in numbers.items()]


def _inline(folder: Path, name: str, generated: Mapping[str, str]) -> str:
    text = generated[name] if name in generated else (folder / name).read_text()
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.splitlines(), 1):
        include = re.fullmatch(r'#include "([a-z_.]+)"', line)
        lines += [_inline(folder, include[1], generated), f'#line {number + 1} "{name}"'] if include else [line]
    return "\n".join(lines)
