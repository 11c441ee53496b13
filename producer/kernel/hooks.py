"""The ladder of hooks: for each stream its places in the kernel, best first, and which of them this host allows.

A rung is tried with a program of two instructions before anything is compiled: the kernel's refusal costs a millisecond
and is kept as the reason. Standard library only.

fentry      BTF types; x86-64 Linux 5.5, arm64 6.0. Sees TCP's own calls: no segment that is sent without a socket of
            its own (the reset of a closed port, the acknowledgement in time wait), and none of the flags ECE and CWR.
kprobe      As fentry, but sk_cookie is null until somebody has asked for it, and each hook costs a trap more. A run is
            skipped while any other kprobe program runs on the CPU, and Linux before 6.7 does not count that. Debian's
            kernels (perf_event_paranoid 3) allow it to root alone, whatever CAP_PERFMON says.
raw_tp      Retransmits alone, at the kernel's own tracepoints, with BTF types (tp_btf). Before Linux 6.17 they tell
            nothing of a retransmission that failed in the sending host, though the kernel counts it.
cgroup_skb  Where a segment leaves IP, for the sockets below the cgroup v2 root: the header as it is on the wire. Sees
            no SYN-ACK of SYN cookies, no acknowledgement in time wait (they have no socket there), nothing that IPsec
            has encrypted, and on Linux 6.1 no SYN-ACK over IPv6 (on 6.12 it does). A retransmit is a segment below what
            the socket has sent, or a SYN-ACK later than its request's first; such a program may interrupt itself, so
            that none is skipped. A retransmission that failed before it got there is taken at the raw tracepoint, where
            that tells of it; one that the queue behind it drops has err 0.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from producer.kernel import bpf_syscall
from producer.kernel.btf import FUNC, TYPEDEF, Btf


@dataclass(frozen=True, slots=True)
class Hook:
    """One program and its place: `program` is the C function, `target` the kernel function or tracepoint."""

    program: str
    target: str
    attach_type: int


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to take a stream: all its hooks or none."""

    name: str
    hooks: tuple[Hook, ...]
    beside: str | None = None
    """The transmit rung whose program takes this stream too: this rung is possible only where that one is in use."""


_FENTRY, _FEXIT, _RAW_TP = bpf_syscall.ATTACH_FENTRY, bpf_syscall.ATTACH_FEXIT, bpf_syscall.ATTACH_RAW_TP
_KPROBE, _EGRESS = bpf_syscall.ATTACH_PERF_EVENT, bpf_syscall.ATTACH_CGROUP_EGRESS

LADDERS = {
    "transmit": (
        Rung(
            "fentry",
            (
                Hook("fentry_tcp_transmit_skb", "__tcp_transmit_skb", _FENTRY),
                Hook("fentry_tcp_make_synack", "tcp_make_synack", _FENTRY),
            ),
        ),
        Rung(
            "kprobe",
            (
                Hook("kprobe_tcp_transmit_skb", "__tcp_transmit_skb", _KPROBE),
                Hook("kprobe_tcp_make_synack", "tcp_make_synack", _KPROBE),
            ),
        ),
        Rung("cgroup_skb", (Hook("cgroup_skb_egress", "egress", _EGRESS),)),
    ),
    "retransmit": (
        Rung(
            "fentry",
            (
                Hook("fexit_tcp_retransmit_skb", "tcp_retransmit_skb", _FEXIT),
                Hook("fentry_tcp_send_loss_probe", "tcp_send_loss_probe", _FENTRY),
                Hook("fexit_tcp_send_loss_probe", "tcp_send_loss_probe", _FEXIT),
                Hook("fexit_inner_retransmit_skb", "__tcp_retransmit_skb", _FEXIT),
                Hook("fexit_tcp_rtx_synack", "tcp_rtx_synack", _FEXIT),
            ),
        ),
        Rung(
            "kprobe",
            (
                Hook("kprobe_tcp_retransmit_skb", "tcp_retransmit_skb", _KPROBE),
                Hook("kretprobe_tcp_retransmit_skb", "tcp_retransmit_skb", _KPROBE),
                Hook("kprobe_tcp_send_loss_probe", "tcp_send_loss_probe", _KPROBE),
                Hook("kretprobe_tcp_send_loss_probe", "tcp_send_loss_probe", _KPROBE),
                Hook("kprobe_inner_retransmit_skb", "__tcp_retransmit_skb", _KPROBE),
                Hook("kretprobe_inner_retransmit_skb", "__tcp_retransmit_skb", _KPROBE),
                Hook("kprobe_tcp_rtx_synack", "tcp_rtx_synack", _KPROBE),
                Hook("kretprobe_tcp_rtx_synack", "tcp_rtx_synack", _KPROBE),
            ),
        ),
        Rung("cgroup_skb", (Hook("raw_tp_failed_retransmit", "tcp_retransmit_skb", _RAW_TP),), beside="cgroup_skb"),
        Rung(
            "raw_tp",
            (
                Hook("raw_tp_tcp_retransmit_skb", "tcp_retransmit_skb", _RAW_TP),
                Hook("raw_tp_tcp_retransmit_synack", "tcp_retransmit_synack", _RAW_TP),
            ),
        ),
    ),
}

OWN_SOCKETS = Hook("raw_tp_inet_sock_set_state", "inet_sock_set_state", _RAW_TP)
"""Beside each rung: it tells which sockets belong to the agent's own, and when they end. It makes no events."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rung that this host does not allow, and the reason in one line."""

    stream: str
    rung: str
    reason: str


def load(hook: Hook, instructions: bytes, btf: Btf) -> int:
    """Load the instructions as the program of `hook`; LookupError where the kernel does not have its target."""
    if hook.attach_type == _EGRESS:
        return bpf_syscall.load_program(hook.program, instructions, bpf_syscall.PROG_CGROUP_SKB, attach_type=_EGRESS)
    if hook.attach_type == _KPROBE:
        return bpf_syscall.load_program(hook.program, instructions, bpf_syscall.PROG_KPROBE)
    if hook.attach_type == _RAW_TP:
        target = btf.find(TYPEDEF, f"btf_trace_{hook.target}")
    else:
        target = btf.find(FUNC, hook.target)
    if target is None:
        raise LookupError(f"this kernel has no {hook.target}")
    return bpf_syscall.load_program(
        hook.program, instructions, bpf_syscall.PROG_TRACING, attach_type=hook.attach_type, attach_btf_id=target
    )


def attach(hook: Hook, program: int, cgroup_root: Path | None) -> int:
    """Attach a loaded program through a link and return the link's descriptor."""
    if hook.attach_type == _KPROBE:
        return bpf_syscall.attach_kprobe(program, hook.target, on_return=hook.program.startswith("kretprobe_"))
    if hook.attach_type != _EGRESS:
        return bpf_syscall.attach_tracing(program)
    if cgroup_root is None:
        raise LookupError("no cgroup v2 file system is mounted")
    folder = os.open(cgroup_root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return bpf_syscall.attach_cgroup(program, folder, _EGRESS)
    finally:
        os.close(folder)


def refusal(rung: Rung, btf: Btf, cgroup_root: Path | None) -> str | None:
    """Return why the host does not allow `rung`, or None if it does. Leaves nothing attached."""
    for hook in rung.hooks:
        # A cgroup program's verdict decides over packets: the trial lets them pass.
        trial = bpf_syscall.RETURN_1 if hook.attach_type == _EGRESS else bpf_syscall.RETURN_0
        descriptors: list[int] = []
        try:
            descriptors.append(load(hook, trial, btf))
            descriptors.append(attach(hook, descriptors[0], cgroup_root))
        except (OSError, LookupError, bpf_syscall.VerifierError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return f"{hook.target}: {reason}"
        finally:
            bpf_syscall.close_all(descriptors)
    return None


def choose(
    stream: str, allowed: Iterable[str], btf: Btf, cgroup_root: Path | None, transmit: str | None = None
) -> tuple[Rung | None, list[Refusal]]:
    """Return the best rung of `stream` among `allowed` that the host allows, and why the better ones were refused.

    `transmit` is the rung of the transmit stream, where that is chosen already.
    """
    refusals = []
    wanted = set(allowed)
    for rung in LADDERS[stream]:
        if rung.name not in wanted:
            refusals.append(Refusal(stream, rung.name, "not among the hooks that the configuration allows"))
            continue
        if rung.beside != transmit and rung.beside is not None:
            refusals.append(Refusal(stream, rung.name, f"transmits are not taken by {rung.beside}"))
            continue
        reason = refusal(rung, btf, cgroup_root)
        if reason is None:
            return rung, refusals
        refusals.append(Refusal(stream, rung.name, reason))
    return None, refusals


def cgroup2_root(mounts: Path = Path("/proc/self/mounts")) -> Path | None:
    """Return where the cgroup v2 hierarchy is mounted, or None."""
    for line in mounts.read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path.encode().decode("unicode_escape"))
    return None
