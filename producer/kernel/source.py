"""The C source that a host compiles: the files of bpf/ joined, with the running kernel's layouts and the chosen hooks.

bcc rewrites map accesses only in its main file, so the local headers are inlined. #line directives make the compiler's
messages name the original files. Standard library only.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from producer.errors import UnavailableError
from producer.kernel.btf import FUNC, TYPEDEF, Btf, kernel_header, missing
from producer.kernel.features import Features, machine
from producer.kernel.hooks import HOOKS_BY_STREAM

# The members that the programs read, by the struct that the verifier sees. A path may lead into nested structs.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "net": ("ns.inum as ns_inum",),
    "sock_common": ("skc_family", "skc_num", "skc_dport", "skc_daddr", "skc_rcv_saddr"),
    "sock": ("__sk_common.skc_net.net as skc_net", "__sk_common.skc_state", "sk_socket"),
    "tcp_sock": ("rcv_nxt", "snd_nxt", "snd_una", "snd_up", "tcp_clock_cache", "inet_conn.icsk_inet.inet_sport"),
    "tcp_request_sock": ("snt_isn", "rcv_nxt"),
    "sk_buff": ("cb", "tstamp"),
    "tcp_skb_cb": ("seq", "end_seq", "tcp_gso_segs", "tcp_flags"),
    "socket": ("sk",),
    "task_struct": ("tgid", "comm", "group_leader"),
}
# If the kernel lacks one of these members, the fields that depend on it are null.
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
        "sk_cgrp_data.cgroup as sk_cgroup",  # since Linux 5.15
        "sk_cgrp_data.val as sk_cgroup_val",  # before
        "sk_err",
        "sk_pacing_rate",
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
        "retransmit_skb_hint",
        "total_retrans",
        "snd_wnd",
        "rcv_wnd",
        "mss_cache",
        "tcp_tx_delay",
        "fastopen_rsk",
        "is_mptcp",
        "inet_conn.icsk_ulp_data",
        "segs_out",
        "data_segs_out",
        "segs_in",
        "data_segs_in",
        "bytes_sent",
        "bytes_retrans",
        "bytes_acked",
        "bytes_received",
        "delivered",
        "delivered_ce",
        "dsack_dups",
        "reord_seen",
        "rcv_ooopack",
        "chrono_type",
        "chrono_start",
        "chrono_stat",
        "rate_delivered",
        "rate_interval_us",
        "rtt_min",
        "inet_conn.icsk_ca_ops",
    ),
    "mptcp_subflow_context": ("conn",),
    "mptcp_sock": ("first",),
    "tcp_congestion_ops": ("name",),
    "bpf_iter_meta": ("seq", "session_id"),
    "request_sock": ("num_retrans",),
    "tcp_request_sock": ("snt_synack",),
    # x86-64 and arm64; kprobes only.
    "pt_regs": ("di", "si", "dx", "cx", "r8", "ax", "sp", "regs"),
}
WANTED = {
    struct: REQUIRED.get(struct, ()) + OPTIONAL.get(struct, ()) for struct in dict.fromkeys([*REQUIRED, *OPTIONAL])
}

HZ_MARK = 0x7A68_5F72_6562_7066
"""Stands for the kernel's HZ in compiled programs: neither BTF nor a trial program shows it."""

_HOOKS = [f"{stream}_{hook.name}".upper() for stream, hooks in HOOKS_BY_STREAM.items() for hook in hooks]


def program_text(folder: Path, btf: Btf, layout_check: str) -> str:
    """Return the whole C source. `layout_check` is C that compares events.h with the agent's dtypes."""
    if lacking := missing(btf, REQUIRED):
        raise UnavailableError(f"this kernel's structs lack members that ReBPF needs: {', '.join(lacking)}")
    return _joined(folder, kernel_header(btf, WANTED), layout_check)


def made_of(folder: Path, layout_check: str) -> str:
    """Return a digest of all that is compiled for any kernel: the C source and its headers without the layouts."""
    shim = [[str(path.relative_to(folder)), path.read_text()] for path in sorted(folder.glob("shim/**/*.h"))]
    made_of = [_joined(folder, "", layout_check), WANTED, shim, hook_macros({})]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def made_for(btf: Btf, features: Features) -> str:
    """Return a digest of all that a compilation takes from the kernel."""
    made_for = [machine(btf), kernel_header(btf, WANTED), kernel_macros(btf, features)]
    return hashlib.sha256(json.dumps(made_for).encode()).hexdigest()


def hook_macros(hooks: Mapping[str, str]) -> list[str]:
    """Return the compiler flags for the chosen hooks, by stream."""
    chosen = {f"{stream}_{hook}".upper() for stream, hook in hooks.items()}
    numbers = {name: int(name in chosen) for name in _HOOKS}
    # All streams are in one compilation: pointers have BTF types unless one stream uses kprobes.
    return _defined({**numbers, "PROBE_READ": int("kprobe" in hooks.values()), "HZ_MARK": HZ_MARK})


def kernel_macros(btf: Btf, features: Features) -> list[str]:
    """Return the compiler flags for what the kernel has."""
    tracepoint = btf.find(TYPEDEF, "btf_trace_tcp_retransmit_skb")
    numbers = {
        # The first parameter of a tracepoint's typedef is the data pointer.
        "RETRANSMIT_TRACEPOINT_HAS_ERR": int(tracepoint is not None and btf.params(tracepoint) > 3),
        # Whether a SYN-ACK's retransmission is counted by the caller of tcp_rtx_synack; since Linux 6.17 by itself.
        "SYNACK_COUNTED_BY_CALLER": int(btf.find(FUNC, "inet_rtx_syn_ack") is not None),
        "HAS_ATOMIC_FETCH": int(features.atomic_fetch),
        "HAS_TRACING_COOKIE": int(features.tracing_cookie),
        "HAS_TRACING_STORAGE": int(features.tracing_storage),
    }
    return _defined(numbers)


def _defined(numbers: Mapping[str, int]) -> list[str]:
    return [f"-D{name}={value}" for name, value in numbers.items()]


def _joined(folder: Path, kernel: str, layout_check: str) -> str:
    return _inline(folder, "rebpf.bpf.c", {"kernel.h": kernel, "layout_check.h": layout_check})


def _inline(folder: Path, name: str, generated: Mapping[str, str]) -> str:
    text = generated[name] if name in generated else (folder / name).read_text()
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.splitlines(), 1):
        include = re.fullmatch(r'#include "([a-z_.]+)"', line)
        lines += [_inline(folder, include[1], generated), f'#line {number + 1} "{name}"'] if include else [line]
    return "\n".join(lines)
