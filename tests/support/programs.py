"""The BPF programs in the kernel: their ids, and what the kernel counts of them."""

import struct
from ctypes import byref, c_uint32
from typing import TYPE_CHECKING, NamedTuple

from producer.kernel import bpf_syscall

if TYPE_CHECKING:  # it needs numpy, which a host under systemd has in the package's environment alone
    from producer.kernel.capture import Capture


class ProgramInfo(NamedTuple):
    """The kernel's counts for a program. run_time_ns and run_cnt are 0 unless kernel.bpf_stats_enabled is 1."""

    program_id: int
    run_time_ns: int
    run_cnt: int


def program_info(program: int) -> ProgramInfo:
    info = bpf_syscall._info(program, 208)
    return ProgramInfo(*struct.unpack_from("<I", info, 4), *struct.unpack_from("<QQ", info, 192))


def program_ids() -> set[int]:
    """Return the ids of all programs that are loaded in the kernel; needs CAP_SYS_ADMIN."""
    ids: set[int] = set()
    last = c_uint32(0)
    while True:
        try:
            bpf_syscall._call("bpf_prog_get_next_id", last, byref(last))
        except FileNotFoundError:
            return ids
        ids.add(last.value)


def ids_of(capture: "Capture") -> set[int]:
    """Return the ids of the programs whose skipped runs a capture counts."""
    return {program_info(program).program_id for programs in capture._programs.values() for program in programs}
