"""What the running kernel offers to BPF programs, found by trial. `check` and `run` make the same trials.

Versions tell little, because distributions backport. A trial is a program of a few instructions that the verifier
accepts or rejects, which takes a millisecond. Standard library only.
"""

import errno
import os
from dataclasses import dataclass

from producer.errors import PermissionDenied
from producer.host import capabilities
from producer.kernel import bpf_syscall
from producer.kernel.bpf_syscall import LD_IMM64, PSEUDO_MAP_FD, instruction
from producer.kernel.btf import FUNC, TYPEDEF, Btf
from producer.kernel.symbols import split_functions

TRIAL_STORAGE = bpf_syscall.MapInfo(
    bpf_syscall.MAP_SK_STORAGE, 4, 8, 0, bpf_syscall.NO_PREALLOC | bpf_syscall.CLONE, "trial"
)
SOCKET_STORAGE, TASK_FILES = ITERATORS = ("bpf_sk_storage_map", "task_file")
"""What the programs iterate over, by the kernel's names."""
_TRIAL_RING = bpf_syscall.MapInfo(bpf_syscall.MAP_RINGBUF, 0, 0, 1 << 16, 0, "trial")

# Opcodes and helpers: include/uapi/linux/bpf.h.
_LOAD, _STORE, _ATOMIC, _MOV, _CALL = 0x79, 0x7A, 0xDB, 0xB7, 0x85
_FETCH_ADD = 0x01
_GET_SOCKET_COOKIE, _SK_STORAGE_GET = 46, 107
_ARM64_FETCH = "aarch64_insn_gen_atomic_ld_op"
_FIRST_ARGUMENT = instruction(_LOAD, 1, 1, 0, 0)  # the tracepoint's: a socket


@dataclass(frozen=True, slots=True)
class Features:
    """Whether this kernel has each feature, with the first version that does."""

    ring_buffer: bool
    """5.8. Nothing works without it."""
    atomic_fetch: bool
    """5.12 on x86-64, 5.18 on arm64. Without it, event numbers are assigned by level (bpf/number.h)."""
    tracing_cookie: bool
    """5.12: tracing programs can create a socket's cookie. Without it, they only read it."""
    tracing_storage: bool
    """5.11: tracing programs can use socket storage. Without it, the programs use LRU hashes."""
    iterators: frozenset[str]
    """The ITERATORS whose programs load. Some kernels refuse those over maps. All use socket storage."""
    split: frozenset[str] | None
    """Functions that the kernel's compiler has split, or None if that is unknown."""

    @classmethod
    def find(cls, btf: Btf) -> "Features":
        """Try each feature. Needs the capabilities for loading; PermissionDenied if they do not suffice."""
        tracing_storage = _has_tracing_storage(btf)
        return cls(
            _has_ring_buffer(),
            _has_atomic_fetch(),
            _has_tracing_cookie(btf),
            tracing_storage,
            frozenset(each for each in ITERATORS if tracing_storage and _iterates(each, btf)),
            split_functions(),
        )

    @classmethod
    def expected(cls, btf: Btf) -> "Features":
        """Return the features of another kernel by its functions, for a compilation; `split` is unknown."""
        tracing_cookie = btf.find(FUNC, "bpf_get_socket_ptr_cookie") is not None
        tracing_storage = btf.find(FUNC, "bpf_sk_storage_get_tracing") is not None
        return cls(
            ring_buffer=btf.find(FUNC, "bpf_ringbuf_reserve") is not None,
            # On x86-64, no function is new with it, but it came with the version that brought the cookie.
            atomic_fetch=tracing_cookie if machine(btf) == "x86_64" else btf.find(FUNC, _ARM64_FETCH) is not None,
            tracing_cookie=tracing_cookie,
            tracing_storage=tracing_storage,
            iterators=frozenset(ITERATORS if tracing_storage else ()),
            split=None,
        )


def machine(btf: Btf) -> str:
    """Return the processor of a BTF's kernel as uname(2) names it, by its registers."""
    if btf.member("pt_regs", "di"):
        return "x86_64"
    return "aarch64" if btf.member("pt_regs", "pstate") else "another processor"


def _has_ring_buffer() -> bool:
    try:
        os.close(bpf_syscall.create_map(_TRIAL_RING))
    except PermissionError as error:
        raise PermissionDenied(f"the kernel denies BPF maps to this process: {_why_denied()}") from error
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _why_denied() -> str:
    if capabilities.in_user_namespace():
        return "its capabilities count only in its user namespace: run it outside, as the host's root"
    return "allow bpf(2) in its seccomp profile and LSM; before Linux 5.11, set LimitMEMLOCK=infinity, too"


def _has_atomic_fetch() -> bool:
    on_stack = instruction(_STORE, 10, 0, -8, 0) + instruction(_MOV, 1, 0, 0, 1)
    instructions = on_stack + instruction(_ATOMIC, 10, 1, -8, _FETCH_ADD) + bpf_syscall.RETURN_1
    return _loads(instructions, bpf_syscall.PROG_CGROUP_SKB, bpf_syscall.ATTACH_CGROUP_EGRESS)


def _has_tracing_cookie(btf: Btf) -> bool:
    return _traces(_FIRST_ARGUMENT + instruction(_CALL, 0, 0, 0, _GET_SOCKET_COOKIE), btf)


def _has_tracing_storage(btf: Btf) -> bool:
    try:
        storage = bpf_syscall.create_map(TRIAL_STORAGE)
    except OSError:
        return False
    arguments = _FIRST_ARGUMENT + instruction(0xBF, 2, 1, 0, 0)
    arguments += instruction(LD_IMM64, 1, PSEUDO_MAP_FD, 0, storage) + instruction(0, 0, 0, 0, 0)
    arguments += instruction(_MOV, 3, 0, 0, 0) + instruction(_MOV, 4, 0, 0, 0)
    try:
        return _traces(arguments + instruction(_CALL, 0, 0, 0, _SK_STORAGE_GET), btf)
    finally:
        os.close(storage)


def _traces(instructions: bytes, btf: Btf) -> bool:
    """Whether a program of a socket's tracepoint can have these instructions."""
    target = btf.find(TYPEDEF, "btf_trace_inet_sock_set_state")
    return _loads(instructions + bpf_syscall.RETURN_0, bpf_syscall.PROG_TRACING, bpf_syscall.ATTACH_RAW_TP, target)


def _iterates(objects: str, btf: Btf) -> bool:
    target = btf.find(FUNC, f"bpf_iter_{objects}")
    return _loads(bpf_syscall.RETURN_0, bpf_syscall.PROG_TRACING, bpf_syscall.ATTACH_ITER, target)


def _loads(instructions: bytes, prog_type: int, attach_type: int, target: int | None = 0) -> bool:
    """Whether the verifier accepts a program; None is a `target` that the kernel lacks."""
    if target is None:
        return False
    try:
        program = bpf_syscall.load_program(
            "trial", instructions, prog_type, attach_type=attach_type, attach_btf_id=target
        )
    except bpf_syscall.VerifierError:
        return False
    os.close(program)
    return True
