"""The bpf(2) commands that ReBPF needs, by ctypes: programs, links, map elements, object information.

bcc only compiles. Loading and attaching are here because a program attached through a link is detached with its last
descriptor (bcc's attach_func leaves it on the cgroup after kill -9), and because the agent uses maps without bcc.
Standard library only. Layouts: union bpf_attr in include/uapi/linux/bpf.h. Functions raise OSError with the kernel's
errno.
"""

import ctypes
import os
import platform
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NUMBERS = {"x86_64": (321, 298, 324), "aarch64": (280, 241, 283)}
_NR_BPF, _NR_PERF_EVENT_OPEN, _NR_MEMBARRIER = _NUMBERS.get(platform.machine(), (-1, -1, -1))

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY, _PROG_LOAD = 0, 1, 2, 3, 4, 5
_OBJ_PIN, _OBJ_GET = 6, 7
_PROG_GET_NEXT_ID, _INFO_BY_FD, _RAW_TRACEPOINT_OPEN, _LINK_CREATE = 11, 15, 17, 28
_MEMBARRIER_CMD_GLOBAL = 1
_CLOCK_MONOTONIC_COARSE = 6

PROG_KPROBE, PROG_CGROUP_SKB, PROG_TRACING = 2, 8, 26
ATTACH_NONE, ATTACH_CGROUP_EGRESS, ATTACH_RAW_TP, ATTACH_FENTRY, ATTACH_FEXIT, ATTACH_PERF_EVENT = 0, 1, 23, 24, 25, 41

_BPF_FS_MAGIC = 0xCAFE4A11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class VerifierError(Exception):
    """The kernel rejected a program. `log` is the verifier's output, which may be empty."""

    def __init__(self, name: str, error: OSError, log: str) -> None:
        self.errno = error.errno
        self.log = log
        reasons = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
        super().__init__(f"{name}: {error.strerror}" + (f": {reasons[-1].strip()}" if reasons else ""))


@dataclass(frozen=True, slots=True)
class MapInfo:
    """The attributes of a map. The kernel stores 15 characters of the name."""

    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """The kernel's counts for a program. run_time_ns and run_cnt are 0 unless kernel.bpf_stats_enabled is 1."""

    program_id: int
    run_time_ns: int
    run_cnt: int
    recursion_misses: int


def load_program(
    name: str, instructions: bytes, prog_type: int, *, attach_type: int = ATTACH_NONE, attach_btf_id: int = 0
) -> int:
    """Load a program under the GPL and return its descriptor. VerifierError has the log."""

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
    """Attach a fentry, fexit or BTF raw tracepoint program to the target it was loaded for; return the link."""
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", 0, program, 0))


def attach_cgroup(program: int, cgroup: int, attach_type: int) -> int:
    """Attach to a cgroup v2, given by its folder's descriptor, in addition to other programs; return the link."""
    return _bpf(_LINK_CREATE, struct.pack("<IIII", program, cgroup, attach_type, 0))


def attach_kprobe(program: int, function: str, *, on_return: bool) -> int:
    """Attach to a kernel function by a perf event; return the link, which holds the event."""
    pmu = Path("/sys/bus/event_source/devices/kprobe")
    name = ctypes.create_string_buffer(function.encode())
    bit = int((pmu / "format/retprobe").read_text().split(":")[1]) if on_return else 0
    config = (1 << bit) if on_return else 0
    # struct perf_event_attr: type, size, config, ..., config1 at 56, config2 at 64.
    attr = struct.pack("<IIQ40xQQ56x", int((pmu / "type").read_text()), 128, config, _address(name), 0)
    buffer = ctypes.create_string_buffer(attr, len(attr))
    event = _libc.syscall(_NR_PERF_EVENT_OPEN, buffer, -1, 0, -1, ctypes.c_ulong(8))  # 8: PERF_FLAG_FD_CLOEXEC
    if event < 0:
        raise _last_error()
    try:
        return _bpf(_LINK_CREATE, struct.pack("<IIII", program, event, ATTACH_PERF_EVENT, 0))
    finally:
        os.close(event)


def create_map(info: MapInfo) -> int:
    """Create a map and return its descriptor."""
    sizes = (info.map_type, info.key_size, info.value_size, info.max_entries, info.flags)
    return _bpf(_MAP_CREATE, struct.pack("<IIIIIII16s", *sizes, 0, 0, info.name.encode()))


def map_info(map_fd: int) -> MapInfo:
    """Return the attributes of a map."""
    info = ctypes.create_string_buffer(40)
    _bpf(_INFO_BY_FD, struct.pack("<IIQ", map_fd, len(info), _address(info)))
    kind, key_size, value_size, max_entries, flags, name = struct.unpack("<IxxxxIIII16s", info.raw)
    return MapInfo(kind, key_size, value_size, max_entries, flags, name.rstrip(b"\0").decode())


def lookup(map_fd: int, key: bytes, size: int) -> bytes:
    """Return the value of `key`. For a per-CPU map, `size` is the total over all possible CPUs."""
    key_buffer, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    _bpf(_MAP_LOOKUP, struct.pack("<IxxxxQQQ", map_fd, _address(key_buffer), _address(value), 0))
    return value.raw


def update(map_fd: int, key: bytes, value: bytes) -> None:
    """Insert or replace an element."""
    key_buffer, value_buffer = (
        ctypes.create_string_buffer(key, len(key)),
        ctypes.create_string_buffer(value, len(value)),
    )
    _bpf(_MAP_UPDATE, struct.pack("<IxxxxQQQ", map_fd, _address(key_buffer), _address(value_buffer), 0))


def delete(map_fd: int, key: bytes) -> None:
    """Delete an element."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    _bpf(_MAP_DELETE, struct.pack("<IxxxxQQQ", map_fd, _address(key_buffer), 0, 0))


def keys(map_fd: int, size: int) -> list[bytes]:
    """Return all keys of a map whose keys have `size` bytes."""
    found: list[bytes] = []
    key = ctypes.create_string_buffer(size)
    while True:
        # A null pointer asks for the first key.
        last = ctypes.create_string_buffer(found[-1], size) if found else None
        previous = _address(last) if last else 0
        try:
            _bpf(_MAP_NEXT_KEY, struct.pack("<IxxxxQQ", map_fd, previous, _address(key)))
        except FileNotFoundError:
            return found
        found.append(key.raw)


def pin(descriptor: int, path: Path) -> None:
    """Create a file in a bpffs that holds the object of a descriptor."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, struct.pack("<QI", _address(name), descriptor))


def get(path: Path) -> int:
    """Return a new descriptor of the object that a file in a bpffs holds."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, struct.pack("<QI", _address(name), 0))


def is_bpffs(path: Path) -> bool:
    """Whether a path is in a bpffs."""
    result = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), result) != 0:
        raise _last_error()
    return int(struct.unpack_from("<q", result)[0]) == _BPF_FS_MAGIC


def program_info(program: int) -> ProgramInfo:
    """Return the kernel's counts for a program."""
    info = ctypes.create_string_buffer(232)
    _bpf(_INFO_BY_FD, struct.pack("<IIQ", program, len(info), _address(info)))
    return ProgramInfo(*struct.unpack_from("<I", info, 4), *struct.unpack_from("<QQQ", info, 192))


def program_ids() -> set[int]:
    """Return the ids of all programs that are loaded in the kernel; needs CAP_SYS_ADMIN."""
    ids: set[int] = set()
    last = 0
    while True:
        attr = ctypes.create_string_buffer(struct.pack("<II", last, 0), 128)
        try:
            _call(_PROG_GET_NEXT_ID, attr)
        except FileNotFoundError:
            return ids
        (last,) = struct.unpack_from("<I", attr, 4)
        ids.add(last)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def possible_cpus() -> int:
    """Return the number of CPUs for which a per-CPU map has a value."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
    ends = (each.partition("-") for each in ranges)
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


def jiffies_per_second() -> int:
    """Return the kernel's HZ, the unit of TCP's timers: the resolution of the coarse clock is one tick."""
    return round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))


def wait_for_programs() -> None:
    """Wait until each program that runs now has ended: programs run in RCU sections, and membarrier(2) waits for these.

    Returns at once if the kernel or a seccomp filter rejects membarrier(2).
    """
    _libc.syscall(_NR_MEMBARRIER, _MEMBARRIER_CMD_GLOBAL, 0, 0)


def instruction(opcode: int, dst: int, src: int, offset: int, immediate: int) -> bytes:
    """Return one BPF instruction, struct bpf_insn."""
    return struct.pack("<BBhi", opcode, src << 4 | dst, offset, immediate)


_EXIT = instruction(0x95, 0, 0, 0, 0)
RETURN_0 = instruction(0xB7, 0, 0, 0, 0) + _EXIT
RETURN_1 = instruction(0xB7, 0, 0, 0, 1) + _EXIT


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
