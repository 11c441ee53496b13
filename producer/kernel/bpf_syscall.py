"""The bpf(2) commands that ReBPF needs, by libbpf: programs, links, map elements, object information.

libbpf.so.1 comes with bcc on every supported distribution, but nothing here needs bcc. bcc only compiles. Loading and
attaching are here because a program attached through a link is detached with its last descriptor (bcc's attach_func
leaves it on the cgroup after kill -9), and because the agent uses maps without bcc. Standard library only. Layouts:
bpf.h of libbpf, and include/uapi/linux/bpf.h. Functions raise OSError with the kernel's errno, and UnavailableError if
libbpf is missing.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import platform
import struct
import time
from collections.abc import Iterable, Iterator
from ctypes import c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from producer.errors import UnavailableError

_NUMBERS = {"x86_64": (298, 324), "aarch64": (241, 283)}
_NR_PERF_EVENT_OPEN, _NR_MEMBARRIER = _NUMBERS.get(platform.machine(), (-1, -1))
_MEMBARRIER_CMD_GLOBAL = 1
_LINK_TYPE_CGROUP, _LINK_TYPE_PERF_EVENT = 3, 7
_EVENT_KPROBE, _EVENT_KRETPROBE = 3, 4
_ANY = 0  # BPF_ANY: insert or replace
_CLOCK_MONOTONIC_COARSE = 6
_PERF_EVENT_IOC_SET_BPF = 0x40042408
_KPROBES = Path("/sys/bus/event_source/devices/kprobe")
_ENOTSUPP = 524  # of the kernel alone: strerror does not know it
_LOG_BYTES = (1 << 24) - 1  # the most that all kernels allow
_NOT_SUPPORTED = "not supported by this kernel on this processor (errno 524; fentry on arm64 needs Linux 6.4)"

MAP_SK_STORAGE, MAP_RINGBUF = 24, 27
NO_PREALLOC, CLONE = 1 << 0, 1 << 9
PROG_KPROBE, PROG_CGROUP_SKB, PROG_TRACING = 2, 8, 26
ATTACH_NONE, ATTACH_CGROUP_EGRESS, ATTACH_RAW_TP, ATTACH_FENTRY, ATTACH_FEXIT = 0, 1, 23, 24, 25
ATTACH_ITER, ATTACH_PERF_EVENT = 28, 41
INSTRUCTION = struct.Struct("<BBhi")
"""struct bpf_insn: opcode, registers, offset and immediate number."""
LD_IMM64, PSEUDO_MAP_FD = 0x18, 1
"""The opcode that loads 64 bits, from two instructions, and its source register if these are a map's descriptor."""

_BPF_FS_MAGIC = 0xCAFE4A11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _MapCreateOpts(ctypes.Structure):
    """struct bpf_map_create_opts up to the last member that is used."""

    _fields_ = (
        ("sz", c_size_t),
        *((name, c_uint32) for name in ("btf_fd", "btf_key_type_id", "btf_value_type_id")),
        *((name, c_uint32) for name in ("btf_vmlinux_value_type_id", "inner_map_fd", "map_flags")),
    )


class _ProgLoadOpts(ctypes.Structure):
    """struct bpf_prog_load_opts up to the last member that is used."""

    _fields_ = (
        *(("sz", c_size_t), ("attempts", c_int), ("expected_attach_type", c_uint32)),
        *((name, c_uint32) for name in ("prog_btf_fd", "prog_flags", "prog_ifindex", "kern_version")),
        *((name, c_uint32) for name in ("attach_btf_id", "attach_prog_fd", "attach_btf_obj_fd")),
        *(("fd_array", c_void_p), ("func_info", c_void_p), ("func_info_cnt", c_uint32)),
        *(("func_info_rec_size", c_uint32), ("line_info", c_void_p), ("line_info_cnt", c_uint32)),
        *(("line_info_rec_size", c_uint32), ("log_level", c_uint32), ("log_size", c_uint32), ("log_buf", c_void_p)),
    )


class _LinkCreateOpts(ctypes.Structure):
    """struct bpf_link_create_opts up to the last member that is used."""

    _fields_ = (
        *(("sz", c_size_t), ("flags", c_uint32), ("target_btf_id", c_uint32)),
        *(("iter_info", c_void_p), ("iter_info_len", c_uint32)),
    )


class VerifierError(Exception):
    """The kernel rejected a program. `log` is the verifier's output, which may be empty."""

    def __init__(self, name: str, error: OSError, log: str) -> None:
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


def check_machine(machine: str = platform.machine()) -> None:
    """Raise UnavailableError on a processor that the programs do not support."""
    if machine not in _NUMBERS:
        raise UnavailableError(f"{machine} is not supported: ReBPF runs on {' and '.join(_NUMBERS)}")


def load_program(
    name: str, instructions: bytes, prog_type: int, *, attach_type: int = ATTACH_NONE, attach_btf_id: int = 0
) -> int:
    """Load a program under the GPL and return its descriptor. VerifierError has the log."""
    opts = _ProgLoadOpts(sz=ctypes.sizeof(_ProgLoadOpts), expected_attach_type=attach_type, attach_btf_id=attach_btf_id)
    count = c_size_t(len(instructions) // 8)
    arguments = (prog_type, name.encode()[:15], b"GPL", instructions, count, ctypes.byref(opts))
    try:
        return _call("bpf_prog_load", *arguments)
    except OSError as error:
        # Again with a log. Not at first: a log that is full hides the error.
        log = ctypes.create_string_buffer(_LOG_BYTES)
        opts.log_level, opts.log_size, opts.log_buf = 1, len(log), ctypes.addressof(log)
        with contextlib.suppress(OSError):
            os.close(_call("bpf_prog_load", *arguments))
        raise VerifierError(name, error, log.value.decode(errors="replace")) from error


def attach_tracing(program: int) -> int:
    """Attach a fentry, fexit or BTF raw tracepoint program to the target it was loaded for; return the link."""
    return _call("bpf_raw_tracepoint_open", None, program)


def attach_iterator(program: int, map_fd: int | None) -> int:
    """Attach an iterator, over the elements of a map if it is one of those; return the link, for `run_iterator`."""
    opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts))
    if map_fd is not None:
        info = c_uint32(map_fd)  # union bpf_iter_link_info: map.map_fd
        opts.iter_info, opts.iter_info_len = ctypes.addressof(info), ctypes.sizeof(info)
    return _call("bpf_link_create", program, 0, ATTACH_ITER, ctypes.byref(opts))


def run_iterator(link: int, step_bytes: int = mmap.PAGESIZE) -> Iterator[None]:
    """Run an iterator over all its objects, in steps that end when it has written `step_bytes`."""
    iterator = _call("bpf_iter_create", link)
    try:
        while True:
            # The kernel returns EAGAIN after a million objects without output.
            with contextlib.suppress(BlockingIOError):
                if not os.read(iterator, step_bytes):
                    return
            yield
    finally:
        os.close(iterator)


def attach_cgroup(program: int, cgroup: int, attach_type: int) -> int:
    """Attach to a cgroup v2, given by its folder's descriptor, in addition to other programs; return the link."""
    return _call("bpf_link_create", program, cgroup, attach_type, None)


def attach_kprobe(program: int, function: str, *, on_return: bool, by_link: bool) -> int:
    """Attach to a kernel function by a perf event; return the link, which holds the event.

    Linux before 5.15 has no such links. Without `by_link`, the event itself is returned there, which cannot be pinned.
    """
    if not _KPROBES.exists():
        raise LookupError("this kernel has no kprobes, or /sys is hidden")
    name = ctypes.create_string_buffer(function.encode())
    bit = int((_KPROBES / "format/retprobe").read_text().split(":")[1]) if on_return else 0
    config = (1 << bit) if on_return else 0
    # struct perf_event_attr: type, size, config, ..., config1 at 56, config2 at 64.
    attr = struct.pack("<IIQ40xQQ56x", int((_KPROBES / "type").read_text()), 128, config, ctypes.addressof(name), 0)
    event = _libc.syscall(_NR_PERF_EVENT_OPEN, attr, -1, 0, -1, ctypes.c_ulong(8))  # 8: PERF_FLAG_FD_CLOEXEC
    if event < 0:
        raise _last_error()
    try:
        return _call("bpf_link_create", program, event, ATTACH_PERF_EVENT, None)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if by_link:
            raise LookupError("this kernel cannot keep kprobes attached for the next start") from error
        if _libc.ioctl(event, _PERF_EVENT_IOC_SET_BPF, program):
            raise _last_error() from error
        return os.dup(event)
    finally:
        os.close(event)


def create_map(info: MapInfo) -> int:
    """Create a map and return its descriptor."""
    opts = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=info.flags)
    sizes = (info.key_size, info.value_size, info.max_entries)
    if info.map_type != MAP_SK_STORAGE:
        return _call("bpf_map_create", info.map_type, info.name.encode(), *sizes, ctypes.byref(opts))
    types = _btf_of_storage(info.value_size)
    opts.btf_key_type_id, opts.btf_value_type_id = 1, 3
    opts.btf_fd = _call("bpf_btf_load", types, c_size_t(len(types)), None)
    try:
        return _call("bpf_map_create", info.map_type, info.name.encode(), *sizes, ctypes.byref(opts))
    finally:
        os.close(opts.btf_fd)


def _btf_of_storage(value_size: int) -> bytes:
    """Return the BTF that socket storage requires: 1 is the key, a 32-bit integer; 3 the value, an array of bytes."""
    integer, array = 1 << 24, 3 << 24
    types = struct.pack("<4I", 1, integer, 4, 32) + struct.pack("<4I", 1, integer, 1, 8)
    types += struct.pack("<6I", 0, array, 0, 2, 1, value_size)
    names = b"\0int\0"
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names)) + types + names


def map_info(map_fd: int) -> MapInfo:
    """Return the attributes of a map."""
    kind, key_size, value_size, max_entries, flags, name = struct.unpack("<IxxxxIIII16s", _info(map_fd, 40))
    return MapInfo(kind, key_size, value_size, max_entries, flags, name.rstrip(b"\0").decode())


def lookup(map_fd: int, key: bytes, size: int) -> bytes:
    """Return the value of `key`. For a per-CPU map, `size` is the total over all possible CPUs."""
    value = ctypes.create_string_buffer(size)
    _call("bpf_map_lookup_elem", map_fd, key, value)
    return value.raw


def update(map_fd: int, key: bytes, value: bytes) -> None:
    """Insert or replace an element."""
    _call("bpf_map_update_elem", map_fd, key, value, c_uint64(_ANY))


def delete(map_fd: int, key: bytes) -> None:
    """Delete an element."""
    _call("bpf_map_delete_elem", map_fd, key)


def keys(map_fd: int, size: int) -> list[bytes]:
    """Return all keys of a map whose keys have `size` bytes."""
    found: list[bytes] = []
    key = ctypes.create_string_buffer(size)
    while True:
        try:
            # A null pointer requests the first key.
            _call("bpf_map_get_next_key", map_fd, found[-1] if found else None, key)
        except FileNotFoundError:
            return found
        found.append(key.raw)


def pin(descriptor: int, path: Path) -> None:
    """Create a file in a bpffs that holds the object of a descriptor."""
    _call("bpf_obj_pin", descriptor, os.fsencode(path))


def get(path: Path) -> int:
    """Return a new descriptor of the object that a file in a bpffs holds."""
    return _call("bpf_obj_get", os.fsencode(path))


def is_bpffs(path: Path) -> bool:
    """Whether a path is in a bpffs."""
    result = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), result) != 0:
        raise _last_error()
    return int(struct.unpack_from("<q", result)[0]) == _BPF_FS_MAGIC


def is_detached(link: int) -> bool:
    """Whether a link to a cgroup was detached (bpftool link detach). Others cannot be."""
    try:
        kind, cgroup = struct.unpack_from("<I12xQ", _info(link, 32))
    except OSError:  # a perf event
        return False
    return bool(kind == _LINK_TYPE_CGROUP and cgroup == 0)


def recursion_misses(program: int) -> tuple[int, int]:
    """Return a program's id, and how many runs the kernel has skipped because it would have interrupted itself."""
    program_id, misses = struct.unpack_from("<4xI200xQ", _info(program, 216))
    return program_id, misses


def kprobe_misses(link: int) -> tuple[int, int]:
    """Return the id of a link's program, and how many runs its kprobe has missed because another one was running.

    The number is 0 before Linux 6.7, and if the link is not to a kprobe.
    """
    try:
        kind, program_id, event, misses = struct.unpack_from("<I4xI4xI28xQ", _info(link, 64))
    except OSError:  # a perf event
        return 0, 0
    is_kprobe = kind == _LINK_TYPE_PERF_EVENT and event in (_EVENT_KPROBE, _EVENT_KRETPROBE)
    return program_id, misses if is_kprobe else 0


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def open_all(opened: Iterable[int]) -> list[int]:
    """Return the descriptors that an iterator opens one by one. If that raises OSError, none stays open."""
    descriptors: list[int] = []
    try:
        for descriptor in opened:
            descriptors.append(descriptor)
    except OSError:
        close_all(descriptors)
        raise
    return descriptors


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
    """Return one BPF instruction."""
    return INSTRUCTION.pack(opcode, src << 4 | dst, offset, immediate)


_EXIT = instruction(0x95, 0, 0, 0, 0)
RETURN_0 = instruction(0xB7, 0, 0, 0, 0) + _EXIT
RETURN_1 = instruction(0xB7, 0, 0, 0, 1) + _EXIT


def _info(descriptor: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    _call("bpf_obj_get_info_by_fd", descriptor, info, ctypes.byref(c_uint32(size)))
    return info.raw


@functools.cache
def libbpf(name: str = "libbpf.so.1") -> ctypes.CDLL:
    """Return the library, loaded once. Raises UnavailableError with the package that has it."""
    try:
        return ctypes.CDLL(name, use_errno=True)
    except OSError as error:
        raise UnavailableError(
            f"{name} is missing: install the package libbpf1 (Debian, Ubuntu) or libbpf (Fedora, RHEL)"
        ) from error


def _call(function: str, *arguments: object) -> int:
    result: int = getattr(libbpf(), function)(*arguments)
    if result < 0:
        raise _last_error()
    return result


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, _NOT_SUPPORTED if number == _ENOTSUPP else os.strerror(number))
