"""Compiled programs as data, and the cache folder, from which they are loaded without bcc and LLVM.

The folder has a file KEY.json for each combination of source, flags and kernel: a line with the SHA-256 of KEY and the
content, then the content, which is JSON. Programs are loaded with capabilities, so they must not come from a place that
anyone but root can write to: an attacker with the service's user could choose what the next start loads. Therefore only
root uses the cache, and only if the file, the folder and all its parents belong to root, are not links, and are not
writable by others. Otherwise programs are compiled at each start. Standard library only.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from producer.host import state_file
from producer.host.text import parse_json
from producer.kernel import bpf_syscall
from producer.kernel.bpf_syscall import INSTRUCTION, LD_IMM64, PSEUDO_MAP_FD
from producer.kernel.source import HZ_MARK

MAX_FILES = 8
"""Files in the folder; the least recently used beyond these are deleted."""

_MOST_FILE_BYTES = 1 << 26  # a real one has about 100 KB
_OURS = re.compile(r"[0-9a-f]{64}\.(json|new)|tmp\w{8}")
"""Names of our files and of those that a crash left; others stay, in case state_dir is a folder of something else."""
_MAP_NAME = re.compile(r"[A-Za-z0-9_.]{0,15}")
_COMPILER = re.compile(r"/lib(bcc|LLVM|clang)[^/]*$")


@dataclass(frozen=True, slots=True)
class Compiled:
    """Programs by C function name, and their maps. Instructions refer to a map by its index here."""

    maps: Sequence[bpf_syscall.MapInfo]
    programs: Mapping[str, bytes]

    @classmethod
    def from_loaded(cls, programs: Mapping[str, bytes], maps: Iterable[int]) -> "Compiled":
        """Convert programs that refer to maps by descriptor. `maps` come first, then others that they refer to."""
        descriptors = list(maps)

        def index(descriptor: int) -> int:
            if descriptor not in descriptors:
                descriptors.append(descriptor)
            return descriptors.index(descriptor)

        taken = {name: _with_numbers(instructions, index) for name, instructions in programs.items()}
        return cls([bpf_syscall.map_info(descriptor) for descriptor in descriptors], taken)

    def create_maps(self, sizes: Mapping[str, int]) -> list[int]:
        """Create the maps and return their descriptors. `sizes` overrides max_entries by name."""
        sized = (replace(each, max_entries=sizes.get(each.name, each.max_entries)) for each in self.maps)
        return bpf_syscall.open_all(map(bpf_syscall.create_map, sized))

    def instructions(self, program: str, maps: Sequence[int], hz: int) -> bytes:
        """Return a program for loading, with the descriptors of the maps and the kernel's HZ."""
        return _with_numbers(self.programs[program], maps.__getitem__, hz)


def _with_numbers(instructions: bytes, number: Callable[[int], int], hz: int | None = None) -> bytes:
    """Replace the number of each map reference, and the mark of HZ if `hz` is given."""
    changed = bytearray(instructions)
    at = 0
    while at < len(instructions):
        opcode, registers, offset, immediate = INSTRUCTION.unpack_from(instructions, at)
        if opcode == LD_IMM64 and registers >> 4 == PSEUDO_MAP_FD:
            INSTRUCTION.pack_into(changed, at, opcode, registers, offset, number(immediate))
        elif opcode == LD_IMM64 and registers >> 4:
            raise ValueError(f"instruction {at // 8} refers to something other than a map")
        elif hz and opcode == LD_IMM64 and _number(instructions, at) == HZ_MARK:
            INSTRUCTION.pack_into(changed, at, opcode, registers, offset, hz)
            INSTRUCTION.pack_into(changed, at + 8, 0, 0, 0, 0)
        at += 16 if opcode == LD_IMM64 else 8
    return bytes(changed)


def _number(instructions: bytes, at: int) -> int:
    return int.from_bytes(instructions[at + 4 : at + 8] + instructions[at + 12 : at + 16], "little")


def key(headers: Path, *made_of: Any) -> str:
    """Return a digest of all inputs of a compilation except the compiler.

    The kernel is one of them, because bcc asks it which helpers it has.
    """
    files = [[str(path.relative_to(headers)), path.read_text()] for path in sorted(headers.rglob("*.h"))]
    return hashlib.sha256(json.dumps([made_of, files, os.uname()[2:]]).encode()).hexdigest()


def compiler() -> list[str]:
    """Return the compiler's files that this process has loaded: the libraries of bcc and LLVM."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if _COMPILER.search(line)})


class ProgramCache:
    """The cache in the folder `path`. Without a path, or without root, nothing is cached.

    `warnings` collects messages for the operator.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path.absolute() if path and os.geteuid() == 0 else None
        self.warnings: list[str] = []

    def find(self, key: str) -> Compiled | None:
        """Return the programs cached under a key, if the compiler has not changed since."""
        if self._path is None:
            return None
        try:
            check_folders(self._path)
            with own(self._path / f"{key}.json") as descriptor:
                with open(descriptor, "rb", closefd=False) as file:
                    compiler, compiled = _unpacked(key, file.read(_MOST_FILE_BYTES))
                with contextlib.suppress(OSError):
                    os.utime(descriptor)  # most recently used
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(str(error))
            return None
        return compiled if all(_identity(path) == [path, *known] for path, *known in compiler) else None

    def put(self, key: str, compiled: Compiled, compiler: Iterable[str]) -> None:
        """Cache programs, with the compiler's files. Keeps at most MAX_FILES."""
        if self._path is None:
            return
        try:
            check_folders(self._path.parent)
            self._path.mkdir(mode=0o700, exist_ok=True)
            check_folders(self._path)
            state_file.write(self._path / f"{key}.json", _packed(key, compiled, compiler))
            _prune(self._path)
        except (OSError, ValueError) as error:
            self._warn(str(error))

    def drop(self, key: str, reason: str) -> None:
        """Delete programs that cannot be loaded."""
        if self._path is not None:
            self._warn(f"compiled again: {reason}")
            with contextlib.suppress(OSError):
                (self._path / f"{key}.json").unlink()

    def _warn(self, reason: str) -> None:
        warning = f"compiled programs: {reason}"
        if warning not in self.warnings:
            self.warnings.append(warning)


def check_folders(path: Path) -> None:
    """Raise ValueError if anyone but root could change or replace a folder."""
    for folder in (*reversed(path.parents), path):
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{folder} is a link or not a folder")
        _check_roots(folder, status)


def _check_roots(path: Path, status: os.stat_result) -> None:
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # In a sticky folder such as /tmp, others cannot rename or delete root's files.
    shut = not open_to_others or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX)
    if status.st_uid != 0 or not shut:
        raise ValueError(f"{path} must belong to root and be writable only by root")


@contextlib.contextmanager
def own(path: Path) -> Iterator[int]:
    """Open a file that belongs to root and is writable only by root. Raises ValueError if it is not, or OSError."""
    descriptor = state_file.open_regular(path)
    try:
        _check_roots(path, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def _packed(key: str, compiled: Compiled, compiler: Iterable[str]) -> bytes:
    body = json.dumps({"compiler": [*map(_identity, compiler)], **as_json(compiled)}).encode()
    return _checksum(key, body) + b"\n" + body


def _unpacked(key: str, data: bytes) -> tuple[list[list[Any]], Compiled]:
    checksum, _, body = data.partition(b"\n")
    if checksum != _checksum(key, body):
        raise ValueError(f"{key}.json is damaged")
    try:
        known = parse_json(body)
        compiler = [[str(path), *known] for path, *known in known["compiler"]]
        return compiler, from_json(known)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}.json is another version's") from error


def as_json(compiled: Compiled) -> dict[str, Any]:
    """Return programs as JSON can hold them."""
    programs = {name: base64.b64encode(code).decode() for name, code in compiled.programs.items()}
    return {"maps": [astuple(each) for each in compiled.maps], "programs": programs}


def from_json(known: Any) -> Compiled:
    """Return the programs of `as_json`. ValueError if `known` is something else."""
    try:
        maps = [_map(each) for each in known["maps"]]
        programs = {name: base64.b64decode(code, validate=True) for name, code in known["programs"].items()}
        for code in programs.values():
            _with_numbers(code, range(len(maps)).__getitem__)
        return Compiled(maps, programs)
    except (LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError("no compiled programs") from error


def _map(fields: Sequence[Any]) -> bpf_syscall.MapInfo:
    """Raises ValueError or TypeError if these do not describe a map."""
    info = bpf_syscall.MapInfo(*fields)
    *numbers, name = astuple(info)
    if not all(state_file.is_count(number, 1 << 32) for number in numbers) or not _MAP_NAME.fullmatch(name):
        raise ValueError(f"invalid map: {info}")
    return info


def _checksum(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).hexdigest().encode()


def _identity(path: str) -> list[Any]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


def _prune(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process may prune too
        ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: path.lstat().st_mtime_ns, reverse=True)[MAX_FILES:]:
            path.unlink()
