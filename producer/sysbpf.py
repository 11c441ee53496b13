"""The bpf(2) commands that ReBPF uses itself, by ctypes: programs, links, map elements, object information.

bcc compiles; loading and attaching are here, because a program attached through a link goes away with its last descriptor
(bcc's own attach_func leaves it on the cgroup after a kill -9), and because the agent works on maps without bcc.
Standard library only. Layouts: union bpf_attr in include/uapi/linux/bpf.h. Functions raise OSError with the kernel's errno.
"""

import ctypes
import os
import platform
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NR_BPF, _NR_PERF_EVENT_OPEN = {"x86_64": (321, 298), "aarch64": (280, 241)}.get(platform.machine(), (-1, -1))

_MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD = 1, 2, 3, 5
_OBJ_PIN, _OBJ_GET, _PROG_TEST_RUN, _INFO_BY_FD = 6, 7, 10, 15
_RAW_TRACEPOINT_OPEN, _LINK_CREATE = 17, 28

PROG_SOCKET_FILTER, PROG_KPROBE, PROG_CGROUP_SKB, PROG_TRACING = 1, 2, 8, 26
ATTACH_NONE, ATTACH_CGROUP_EGRESS, ATTACH_RAW_TP, ATTACH_FENTRY, ATTACH_FEXIT, ATTACH_PERF_EVENT = 0, 1, 23, 24, 25, 41

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class VerifierError(Exception):
    """The kernel refused a program; `log` is the verifier's own text, empty where it gave none."""

    def __init__(self, name: str, error: OSError, log: str) -> None:
        self.errno = error.errno
        self.log = log
        reasons = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
        super().__init__(f"{name}: {error.strerror}" + (f": {reasons[-1].strip()}" if reasons else ""))


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel counts for a program. run_time_ns and run_cnt are 0 unless kernel.bpf_stats_enabled is 1."""

    run_time_ns: int
    run_cnt: int
    recursion_misses: int


def load_program(
    name: str, instructions: bytes, prog_type: int, *, attach_type: int = ATTACH_NONE, attach_btf_id: int = 0
) -> int:
    """Load a program under the licence GPL and return its descriptor; VerifierError carries the log."""

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attr = struct.pack(
            "<IIQQIIQII16sIIIIQIIQII",
            prog_type, len(instructions) // 8, _address(code), _address(licence),
            1 if log else 0, len(log) if log else 0, _address(log) if log else 0,
            0, 0, name.encode()[:15], 0, attach_type, 0, 0, 0, 0, 0, 0, 0, attach_btf_id,
        )  # fmt: skip
        return _bpf(_PROG_LOAD, attr)

    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    try:
        return attempt(None)
    except OSError as error:
        log = ctypes.create_string_buffer(1 << 20)
        try:
            return attempt(log)
        except OSError:
            raise VerifierError(name, error, log.value.decode(errors="replace")) from error


def attach_tracing(program: int) -> int:
    """Attach a fentry, fexit or BTF raw tracepoint program where it was loaded for; return the link."""
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", 0, program, 0))


def attach_cgroup(program: int, cgroup: int, attach_type: int) -> int:
    """Attach to a cgroup v2 folder's descriptor, beside what others attached; return the link."""
    return _bpf(_LINK_CREATE, struct.pack("<IIII", program, cgroup, attach_type, 0))


def attach_kprobe(program: int, function: str, *, on_return: bool) -> int:
    """Attach to a kernel function by a perf event; return the link, which keeps the event open."""
    pmu = Path("/sys/bus/event_source/devices/kprobe")
    name = ctypes.create_string_buffer(function.encode())
    bit = int((pmu / "format/retprobe").read_text().split(":")[1]) if on_return else 0
    config = (1 << bit) if on_return else 0
    # struct perf_event_attr, first published size 64 and on: type, size, config, ..., config1 at 56, config2 at 64.
    attr = struct.pack("<IIQ40xQQ56x", int((pmu / "type").read_text()), 128, config, _address(name), 0)
    buffer = ctypes.create_string_buffer(attr, len(attr))
    event = _libc.syscall(_NR_PERF_EVENT_OPEN, buffer, -1, 0, -1, ctypes.c_ulong(8))  # 8: PERF_FLAG_FD_CLOEXEC
    if event < 0:
        raise _last_error()
    try:
        return _bpf(_LINK_CREATE, struct.pack("<IIII", program, event, ATTACH_PERF_EVENT, 0))
    finally:
        os.close(event)


def lookup(map_fd: int, key: bytes, size: int) -> bytes:
    """Return the value of `key`; for a per-CPU map `size` is that of all possible CPUs together."""
    key_buffer, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    _bpf(_MAP_LOOKUP, struct.pack("<IxxxxQQQ", map_fd, _address(key_buffer), _address(value), 0))
    return value.raw


def update(map_fd: int, key: bytes, value: bytes) -> None:
    """Insert or replace an element."""
    key_buffer, value_buffer = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE, struct.pack("<IxxxxQQQ", map_fd, _address(key_buffer), _address(value_buffer), 0))


def program_info(program: int) -> ProgramInfo:
    """Return what the kernel counts for a program."""
    info = ctypes.create_string_buffer(232)
    _bpf(_INFO_BY_FD, struct.pack("<IIQ", program, len(info), _address(info)))
    run_time, run_cnt, misses = struct.unpack_from("<QQQ", info, 192)
    return ProgramInfo(run_time, run_cnt, misses)


def possible_cpus() -> int:
    """Return the number of CPUs that a per-CPU map has a value for."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition(",")[2]
    return int(last.rpartition("-")[2]) + 1


def jiffies_per_second() -> int:
    """Measure the kernel's HZ, which TCP's timers are counted in and which no file names.

    A program that returns bpf_jiffies64() runs twice, 100 ms apart.
    """
    program = load_program("rebpf_hz", instruction(0x85, 0, 0, 0, 118) + EXIT, PROG_SOCKET_FILTER)
    try:
        first, first_ns = _test_run(program), time.monotonic_ns()
        time.sleep(0.1)
        ticks, elapsed_ns = _test_run(program) - first, time.monotonic_ns() - first_ns
    finally:
        os.close(program)
    measured = ticks % (1 << 32) * 1e9 / elapsed_ns
    return min((100, 250, 300, 1000), key=lambda hz: abs(hz - measured) / hz)


def instruction(opcode: int, dst: int, src: int, offset: int, immediate: int) -> bytes:
    """Return one BPF instruction, struct bpf_insn."""
    return struct.pack("<BBhi", opcode, src << 4 | dst, offset, immediate)


EXIT = instruction(0x95, 0, 0, 0, 0)
RETURN_1 = instruction(0xB7, 0, 0, 0, 1) + EXIT
RETURN_0 = instruction(0xB7, 0, 0, 0, 0) + EXIT


def _test_run(program: int) -> int:
    data = ctypes.create_string_buffer(64)
    attr = ctypes.create_string_buffer(struct.pack("<IIIIQQII", program, 0, 64, 0, _address(data), 0, 1, 0) + bytes(40), 80)
    _call(_PROG_TEST_RUN, attr)
    return int(struct.unpack_from("<I", attr, 4)[0])


def _address(buffer: "ctypes.Array[ctypes.c_char]") -> int:
    return ctypes.addressof(buffer)


def _bpf(command: int, attr: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attr, max(len(attr), 128)))


def _call(command: int, attr: "ctypes.Array[ctypes.c_char]") -> int:
    result = int(_libc.syscall(_NR_BPF, command, attr, len(attr)))
    if result < 0:
        raise _last_error()
    return result


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
