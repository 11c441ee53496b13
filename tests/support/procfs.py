"""Reads a process's sockets, BPF objects, children, capabilities and memory from /proc, and takes its descriptors."""

import contextlib
import ipaddress
import os
import re
import resource
import select
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.rebpf import DEADLINE_S

_ARENA_BYTES = 1 << 26


class Connection(NamedTuple):
    """A connected TCP socket."""

    local: tuple[str, int]
    peer: tuple[str, int]


def open_files(pid: int | str = "self") -> list[str]:
    """Return what a process has open."""
    targets = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return targets


@contextlib.contextmanager
def without_descriptors() -> Iterator[None]:
    """Leave this process no free descriptor."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


def connections(pid: int) -> set[Connection]:
    """Return the connections whose sockets the process holds."""
    inodes = {target[8:-1] for target in open_files(pid) if target.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, peer, *rest = line.split()
            if rest[6] in inodes and not peer.endswith(":0000"):
                found.add(Connection(_endpoint(local), _endpoint(peer)))
    return found


def bpf_ids(pid: int, kind: str) -> set[int]:
    """Return the ids of BPF objects that the process holds; `kind` is prog, link or map."""
    ids = set()
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = file.read_text()
        except FileNotFoundError:
            continue
        if found := re.search(rf"^{kind}_id:\s*(\d+)$", text, re.MULTILINE):
            ids.add(int(found[1]))
    return ids


def children(pid: int, text: str = "") -> set[int]:
    """Return the pids of the process's children whose command line contains `text`."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and text in stat.with_name("cmdline").read_text():
                found.add(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def ends(pidfd: int) -> bool:
    """Wait until a process ends; return whether it does."""
    return bool(select.select([pidfd], [], [], DEADLINE_S)[0])


def capabilities(pid: int) -> dict[str, set[int]]:
    """Return each capability set (CapEff, ...), as numbers, of the process's threads: a set of what they have."""
    found: dict[str, set[int]] = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            for name, bits in re.findall(r"^(Cap\w+):\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE):
                found.setdefault(name, set()).add(int(bits, 16))
    return found


def _endpoint(text: str) -> tuple[str, int]:
    """From the kernel's form: words of 32 bits in the host's byte order, and the port in hexadecimal."""
    words, _, port = text.partition(":")
    packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int(port, 16)


def anonymous_bytes(pid: int | str) -> int:
    """Return the anonymous memory of a process: its own, without pages of files and rings."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"^Anonymous: +(\d+) kB$", text, re.MULTILINE)[0])


def arenas(pid: int | str) -> int:
    """Return how many arenas glibc's malloc uses. Each but the first reserves 64 MiB, of which a part is in use."""
    text = Path(f"/proc/{pid}/maps").read_text()
    pattern = r"^(\w+)-\w+ rw-p 0+ 00:00 0 *\n\w+-(\w+) ---p 0+ 00:00 0 *$"
    ranges = [(int(begin, 16), int(end, 16)) for begin, end in re.findall(pattern, text, re.MULTILINE)]
    return 1 + sum(end - begin == _ARENA_BYTES and begin % _ARENA_BYTES == 0 for begin, end in ranges)
