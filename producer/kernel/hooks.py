"""The hooks of each stream, best first, and which of them this host allows.

Before anything is compiled, each hook is tried with a program of two instructions. A rejected try costs a millisecond,
and the kernel's error becomes the reason in the log. Standard library only.

fentry      Uses BTF types. x86-64 from Linux 5.5, arm64 from 6.4. Sees TCP's own calls, so it misses segments without
            a full socket (the reset of a closed port, the acknowledgement in time wait) and the flags ECE and CWR.
kprobe      As fentry, but sk_cookie is null until something else creates it, and each probe costs an extra trap. The
            kernel skips a run while another kprobe program runs on the same CPU; Linux before 6.7 does not count these.
            Debian's kernels (perf_event_paranoid 3) allow it only to root, even with CAP_PERFMON.
raw_tp      Retransmits only, at the kernel's tracepoints, with BTF types (tp_btf). Before Linux 6.17 these do not fire
            for a retransmission that failed in the sending host, though the kernel counts it.
cgroup_skb  Sees segments as they leave IP, for sockets below the cgroup v2 root, with the header as on the wire. Misses
            the SYN-ACKs of SYN cookies and acknowledgements in time wait (neither has a socket there), anything that
            IPsec encrypted, and on Linux 6.1 SYN-ACKs over IPv6 (on 6.12 it sees them). A retransmit is a segment below
            the socket's snd_nxt, or a SYN-ACK later than its request's first. These programs may interrupt themselves,
            so the kernel skips no run. Two kinds come from the raw tracepoints: retransmissions that failed before the
            hook, on kernels that report them (one dropped behind the hook has err 0), and SYN-ACKs without a known
            request, as behind NAT, where the hook sees the translated addresses.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from producer.kernel import bpf_syscall, switches
from producer.kernel.btf import FUNC, TYPEDEF, Btf
from producer.kernel.features import ITERATORS, SOCKET_STORAGE, TASK_FILES, TRIAL_STORAGE, Features


@dataclass(frozen=True, slots=True)
class Probe:
    """One program to attach: `program` is the C function, `target` the kernel function, tracepoint or iterator."""

    program: str
    target: str
    attach_type: int
    substitute: "Probe | None" = None
    """The probe to attach instead if the compiler has split the target, or the kernel refuses to iterate over it."""
    captures: bool = True
    """Whether a run that the kernel skips may be a lost event."""
    runs_once: bool = False
    """Whether the program runs once, after all are attached, and is then released."""

    @property
    def runs_on_demand(self) -> bool:
        """Whether the agent runs the program, through its link."""
        return self.attach_type == _ITER and not self.runs_once


@dataclass(frozen=True, slots=True)
class Hook:
    """One way to capture a stream. Either all of its probes are attached, or none."""

    name: str
    probes: tuple[Probe, ...]
    requires: str | None = None
    """The transmit hook whose program also captures this stream; this hook can be used only together with it."""


_FENTRY, _FEXIT, _RAW_TP = bpf_syscall.ATTACH_FENTRY, bpf_syscall.ATTACH_FEXIT, bpf_syscall.ATTACH_RAW_TP
_KPROBE, _EGRESS, _ITER = bpf_syscall.ATTACH_PERF_EVENT, bpf_syscall.ATTACH_CGROUP_EGRESS, bpf_syscall.ATTACH_ITER
_BEGIN_RETRANSMIT = Probe("raw_tp_begin_retransmit", "tcp_retransmit_skb", _RAW_TP, captures=False)
"""The last one of its hook: it must not see a retransmission whose end the others do not."""
_LOCAL_CALLS = {"__tcp_transmit_skb", "__tcp_retransmit_skb", "tcp_retransmit_skb"}
"""Targets with callers in their own source file. All calls of the other functions come from other files."""

HOOKS_BY_STREAM = {
    "transmit": (
        Hook(
            "fentry",
            (
                Probe("fentry_tcp_transmit_skb", "__tcp_transmit_skb", _FENTRY),
                Probe("fentry_tcp_make_synack", "tcp_make_synack", _FENTRY),
            ),
        ),
        Hook(
            "kprobe",
            (
                Probe("kprobe_tcp_transmit_skb", "__tcp_transmit_skb", _KPROBE),
                Probe("kprobe_tcp_make_synack", "tcp_make_synack", _KPROBE),
            ),
        ),
        Hook("cgroup_skb", (Probe("cgroup_skb_egress", "egress", _EGRESS),)),
    ),
    "retransmit": (
        Hook(
            "fentry",
            (
                Probe("fexit_tcp_retransmit_skb", "tcp_retransmit_skb", _FEXIT),
                Probe("fentry_tcp_send_loss_probe", "tcp_send_loss_probe", _FENTRY),
                Probe("fexit_tcp_send_loss_probe", "tcp_send_loss_probe", _FEXIT),
                Probe(
                    "fexit_inner_retransmit_skb",
                    "__tcp_retransmit_skb",
                    _FEXIT,
                    substitute=Probe("fexit_inner_transmit_skb", "__tcp_transmit_skb", _FEXIT),
                ),
                Probe("fexit_tcp_rtx_synack", "tcp_rtx_synack", _FEXIT),
                _BEGIN_RETRANSMIT,
            ),
        ),
        Hook(
            "kprobe",
            (
                Probe("kprobe_tcp_retransmit_skb", "tcp_retransmit_skb", _KPROBE),
                Probe("kretprobe_tcp_retransmit_skb", "tcp_retransmit_skb", _KPROBE),
                Probe("kprobe_tcp_send_loss_probe", "tcp_send_loss_probe", _KPROBE),
                Probe("kretprobe_tcp_send_loss_probe", "tcp_send_loss_probe", _KPROBE),
                Probe(
                    "kprobe_inner_retransmit_skb",
                    "__tcp_retransmit_skb",
                    _KPROBE,
                    substitute=Probe("kprobe_inner_transmit_skb", "__tcp_transmit_skb", _KPROBE),
                ),
                Probe(
                    "kretprobe_inner",
                    "__tcp_retransmit_skb",
                    _KPROBE,
                    substitute=Probe("kretprobe_inner", "__tcp_transmit_skb", _KPROBE),
                ),
                Probe("kprobe_tcp_rtx_synack", "tcp_rtx_synack", _KPROBE),
                Probe("kretprobe_tcp_rtx_synack", "tcp_rtx_synack", _KPROBE),
                _BEGIN_RETRANSMIT,
            ),
        ),
        Hook(
            "cgroup_skb",
            (
                Probe("raw_tp_other_retransmit", "tcp_retransmit_skb", _RAW_TP),
                Probe("raw_tp_unknown_synack", "tcp_retransmit_synack", _RAW_TP),
            ),
            requires="cgroup_skb",
        ),
        Hook(
            "raw_tp",
            (
                Probe("raw_tp_tcp_retransmit_skb", "tcp_retransmit_skb", _RAW_TP),
                Probe("raw_tp_tcp_retransmit_synack", "tcp_retransmit_synack", _RAW_TP),
            ),
        ),
    ),
    "flow": (
        Hook(
            "raw_tp",
            (
                Probe("raw_tp_flow_state", "inet_sock_set_state", _RAW_TP),
                Probe("raw_tp_flow_state_again", "inet_sock_set_state", _RAW_TP),
                *(2 * (Probe("raw_tp_flow_retransmit", "tcp_retransmit_skb", _RAW_TP),)),
                Probe(
                    "iter_flow_states", SOCKET_STORAGE, _ITER, substitute=Probe("iter_flow_files", TASK_FILES, _ITER)
                ),
            ),
        ),
    ),
}

CLOSING_PROGRAMS = 2
"""The first programs of flows, each of which is enough for a closing record."""

OWN_SOCKETS = Probe("raw_tp_inet_sock_set_state", "inet_sock_set_state", _RAW_TP, captures=False)
"""Attached with every hook: tracks the agent's own sockets and their peers, and the processes of all sockets. Produces
no events."""

OLD_SOCKETS = Probe("iter_task_files", TASK_FILES, _ITER, runs_once=True)
"""Run with every hook: finds the processes of sockets that are older than the programs. Left out if the kernel rejects
it, as before Linux 5.11."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the choice of hooks depends on."""

    btf: Btf
    features: Features
    cgroup_root: Path | None
    keeps: bool
    """Whether the hooks are stored for the next start, for which each needs a link."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A hook that this host does not allow, with the reason in one line."""

    stream: str
    hook: str
    reason: str


def load(probe: Probe, instructions: bytes, btf: Btf) -> int:
    """Load the instructions as the program of `probe`. LookupError if the kernel lacks the target."""
    if probe.attach_type == _EGRESS:
        return bpf_syscall.load_program(probe.program, instructions, bpf_syscall.PROG_CGROUP_SKB, attach_type=_EGRESS)
    if probe.attach_type == _KPROBE:
        return bpf_syscall.load_program(probe.program, instructions, bpf_syscall.PROG_KPROBE)
    if probe.attach_type == _RAW_TP:
        target = btf.find(TYPEDEF, f"btf_trace_{probe.target}")
    elif probe.attach_type == _ITER:
        target = btf.find(FUNC, f"bpf_iter_{probe.target}")
    else:
        target = btf.find(FUNC, probe.target)
    if target is None:
        raise LookupError(f"this kernel has no {probe.target}")
    return bpf_syscall.load_program(
        probe.program, instructions, bpf_syscall.PROG_TRACING, attach_type=probe.attach_type, attach_btf_id=target
    )


def attach(probe: Probe, program: int, kernel: Kernel, flow_states: int) -> int:
    """Attach a loaded program and return the descriptor that holds it attached: a link, or a perf event.

    `flow_states` is the map of that name, over which an iterator runs.
    """
    if probe.attach_type == _ITER:
        return bpf_syscall.attach_iterator(program, flow_states if probe.target == SOCKET_STORAGE else None)
    if probe.attach_type == _KPROBE:
        on_return = probe.program.startswith("kretprobe_")
        return bpf_syscall.attach_kprobe(program, probe.target, on_return=on_return, by_link=kernel.keeps)
    if probe.attach_type != _EGRESS:
        return bpf_syscall.attach_tracing(program)
    if kernel.cgroup_root is None:
        raise LookupError("no cgroup v2 file system is mounted")
    folder = os.open(kernel.cgroup_root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return bpf_syscall.attach_cgroup(program, folder, _EGRESS)
    finally:
        os.close(folder)


NO_ITERATORS = "connections have no records until they close: the kernel is older than 5.11, or refuses BPF iterators"


def fitted(hook: Hook, features: Features) -> Hook:
    """Return the hook with the probes that this kernel needs and can have."""
    refused = {*ITERATORS} - features.iterators
    unusable = refused | (features.split or set())
    probes = ((probe.target in unusable and probe.substitute) or probe for probe in hook.probes)
    return replace(hook, probes=tuple(probe for probe in probes if probe.target not in refused))


def combinations(features: Features) -> Iterator[dict[str, Hook]]:
    """Yield all that hosts with these features may choose, by stream, with the substitutes of probes, too."""
    for hooks in itertools.product(*((None, *of_stream) for of_stream in HOOKS_BY_STREAM.values())):
        chosen = {stream: hook for stream, hook in zip(HOOKS_BY_STREAM, hooks, strict=True) if hook}
        transmits = chosen["transmit"].name if "transmit" in chosen else None
        if chosen and all(hook.requires in (None, transmits) for hook in chosen.values()):
            yield {stream: _with_all_probes(fitted(hook, features)) for stream, hook in chosen.items()}


def _with_all_probes(hook: Hook) -> Hook:
    return replace(hook, probes=(*hook.probes, *(probe.substitute for probe in hook.probes if probe.substitute)))


def refusal(hook: Hook, kernel: Kernel) -> str | None:
    """Return why the host does not allow `hook`, fitted to it, or None if it does. Leaves nothing attached."""
    if reason := switches.turned_off(hook.name):
        return reason
    for refuses in (_missed_calls, _rejection):
        for probe in hook.probes:
            if reason := refuses(probe, kernel):
                return f"{probe.target}: {reason}"
    return None


def _missed_calls(probe: Probe, kernel: Kernel) -> str | None:
    """Return why the probe may not see all calls of its target, or None if it does."""
    if probe.attach_type not in (_FENTRY, _FEXIT, _KPROBE) or probe.target not in _LOCAL_CALLS:
        return None
    if kernel.features.split is None:
        return "/proc/kallsyms cannot be read, so it is unknown whether the compiler has split the function"
    if probe.target in kernel.features.split:
        return "the compiler has split the function, so some calls would be missed"
    return None


def _rejection(probe: Probe, kernel: Kernel) -> str | None:
    """Return why the kernel rejects a program of two instructions at the probe, or None if it does not."""
    # A cgroup program returns a verdict on each packet; 1 lets it pass.
    instructions = bpf_syscall.RETURN_1 if probe.attach_type == _EGRESS else bpf_syscall.RETURN_0
    descriptors: list[int] = []
    try:
        descriptors.append(load(probe, instructions, kernel.btf))
        if probe.attach_type == _ITER:
            descriptors.append(bpf_syscall.create_map(TRIAL_STORAGE))
        descriptors.append(attach(probe, descriptors[0], kernel, descriptors[-1]))
    except (OSError, LookupError, bpf_syscall.VerifierError) as error:
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    finally:
        bpf_syscall.close_all(descriptors)
    return None


def choose(
    stream: str, allowed: Iterable[str], kernel: Kernel, transmit: str | None = None
) -> tuple[Hook | None, list[Refusal]]:
    """Return the best of the `allowed` hooks of `stream` that works on this host, and why the better ones do not.

    `transmit` is the transmit stream's hook, once chosen.
    """
    refusals = []
    allowed_names = set(allowed)
    for hook in HOOKS_BY_STREAM[stream]:
        if hook.name not in allowed_names:
            refusals.append(Refusal(stream, hook.name, "not among the hooks that the configuration allows"))
            continue
        if hook.requires != transmit and hook.requires is not None:
            refusals.append(Refusal(stream, hook.name, f"transmits are not captured by {hook.requires}"))
            continue
        fitting = fitted(hook, kernel.features)
        reason = refusal(fitting, kernel)
        if reason is None:
            return fitting, refusals
        refusals.append(Refusal(stream, hook.name, reason))
    return None, refusals
