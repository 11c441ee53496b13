"""Capabilities of the process: query and drop them.

Layouts: include/uapi/linux/capability.h.
"""

import contextlib
import ctypes
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from producer.errors import PermissionDenied

logger = logging.getLogger(__name__)

_VERSION_3 = 0x20080522
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_libc = ctypes.CDLL(None, use_errno=True)

CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 21, 38, 39
LOADING = frozenset({CAP_PERFMON, CAP_BPF})
NAMES = {CAP_NET_ADMIN: "CAP_NET_ADMIN", CAP_PERFMON: "CAP_PERFMON", CAP_BPF: "CAP_BPF"}


def effective() -> int:
    """Return the effective capabilities of the calling thread as a bit mask."""
    return _mask("CapEff")


def missing(needed: frozenset[int] = frozenset(NAMES)) -> list[str]:
    """Return the names of the `needed` capabilities that this process lacks; CAP_SYS_ADMIN includes all of them."""
    if is_admin():
        return []
    have = effective()
    return [NAMES[number] for number in sorted(needed) if not have >> number & 1]


def require_loading() -> None:
    """Raise PermissionDenied if this process may not load BPF programs."""
    if missing(LOADING):
        raise PermissionDenied("loading BPF programs needs root, or the capabilities CAP_BPF and CAP_PERFMON")


def is_admin() -> bool:
    """Whether this process has CAP_SYS_ADMIN."""
    return bool(effective() >> CAP_SYS_ADMIN & 1)


def in_user_namespace() -> bool:
    """Whether this process is in another user namespace than the host's: user_namespaces(7)."""
    try:
        return Path("/proc/self/uid_map").read_bytes().split() != [b"0", b"0", b"4294967295"]
    except OSError:  # a kernel without user namespaces
        return False


def drop_unneeded(access_map: Callable[[], object]) -> None:
    """Drop the capabilities of the calling thread, and so of threads that it starts later.

    Keeps CAP_BPF if `access_map`, a call on an open map, needs it: before Linux 5.19, unless
    kernel.unprivileged_bpf_disabled is 0.
    """
    _set(0, _mask("CapPrm"))
    kept = 0
    try:
        access_map()
    except PermissionError:
        logger.info("this kernel requires CAP_BPF to use open maps: keeping it")
        kept = 1 << CAP_BPF
    _set(kept, kept)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Run without the effective capabilities of the calling thread, and restore them at the end."""
    effective, permitted = _mask("CapEff"), _mask("CapPrm")
    _set(0, permitted)
    try:
        yield
    finally:
        _set(effective, permitted)


def _set(effective: int, permitted: int) -> None:
    header = ctypes.create_string_buffer(struct.pack("<Ii", _VERSION_3, 0))
    words = [word >> shift & 0xFFFFFFFF for shift in (0, 32) for word in (effective, permitted, 0)]
    if _libc.capset(header, struct.pack("<6I", *words)) != 0:
        why = os.strerror(ctypes.get_errno())
        raise PermissionDenied(f"cannot drop capabilities: {why}: allow capset (seccomp), or setcap (SELinux)")


def _mask(name: str) -> int:
    # Bytes, because the file begins with the program's name, which may be any.
    lines = Path("/proc/thread-self/status").read_bytes().split(b"\n")
    return int(next(line for line in lines if line.startswith(f"{name}:".encode())).split()[1], 16)
