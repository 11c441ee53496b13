"""Compiled programs as data, and a folder of them: what was compiled before is loaded without bcc and LLVM.

The folder holds a file for each source, set of flags and kernel, KEY.json: a line with the SHA-256 of KEY and of what
follows, which is JSON. What root loads must not come from where others can write: folder and file count only if they
are the user's own and nobody else may write to them. A file that does not count is compiled afresh, and replaced.
Standard library only.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from producer import statefile, sysbpf

KEPT_FILES = 8
"""The files last used; others are deleted."""

_INSTRUCTION = struct.Struct("<BBhi")
_LD_IMM64, _MAP_FD = 0x18, 1
_MOST_FILE_BYTES = 1 << 26  # what is compiled takes a tenth of a megabyte
_MAP_NAME = re.compile(r"[A-Za-z0-9_.]{0,15}")
_COMPILER = re.compile(r"/lib(bcc|LLVM|clang)[^/]*$")


@dataclass(frozen=True, slots=True)
class Compiled:
    """Programs by their C functions' names, and their maps. Where an instruction has a map, it has its index here."""

    maps: Sequence[sysbpf.MapInfo]
    programs: Mapping[str, bytes]

    @classmethod
    def take(cls, programs: Mapping[str, bytes], maps: Iterable[int]) -> "Compiled":
        """Take programs whose instructions have maps' descriptors; `maps` come first, then what else they refer to."""
        descriptors = list(maps)

        def index(descriptor: int) -> int:
            if descriptor not in descriptors:
                descriptors.append(descriptor)
            return descriptors.index(descriptor)

        taken = {name: _with_maps(instructions, index) for name, instructions in programs.items()}
        return cls([sysbpf.map_info(descriptor) for descriptor in descriptors], taken)

    def create_maps(self, sizes: Mapping[str, int]) -> list[int]:
        """Create the maps, some with other max_entries, by name; return their descriptors."""
        descriptors: list[int] = []
        try:
            for each in self.maps:
                sized = replace(each, max_entries=sizes.get(each.name, each.max_entries))
                descriptors.append(sysbpf.create_map(sized))
        except OSError:
            sysbpf.close_all(descriptors)
            raise
        return descriptors

    def instructions(self, program: str, maps: Sequence[int]) -> bytes:
        """Return a program as the kernel takes it, with the descriptors of the maps."""
        return _with_maps(self.programs[program], maps.__getitem__)


def _with_maps(instructions: bytes, number: Callable[[int], int]) -> bytes:
    """Put another number in each place of a map."""
    changed = bytearray(instructions)
    at = 0
    while at < len(instructions):
        opcode, registers, offset, immediate = _INSTRUCTION.unpack_from(instructions, at)
        if opcode == _LD_IMM64 and registers >> 4 == _MAP_FD:
            _INSTRUCTION.pack_into(changed, at, opcode, registers, offset, number(immediate))
        elif opcode == _LD_IMM64 and registers >> 4:
            raise ValueError(f"instruction {at // 8} refers to something that is no map")
        at += 16 if opcode == _LD_IMM64 else 8
    return bytes(changed)


def key(headers: Path, *made_of: Any) -> str:
    """Return what stands for a compilation: all that goes in, but for the compiler.

    The kernel is part of it: bcc asks it for the helpers that it has.
    """
    files = [[str(path.relative_to(headers)), path.read_text()] for path in sorted(headers.rglob("*.h"))]
    return hashlib.sha256(json.dumps([made_of, files, os.uname()[2:]]).encode()).hexdigest()


def compiler() -> list[str]:
    """Return the files of the compiler that this process has in memory: bcc's library, and LLVM's."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if _COMPILER.search(line)})


class CompiledFolder:
    """The folder at `path`; with None, nothing is kept. What an operator should know is in `warnings`."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.warnings: list[str] = []

    def find(self, key: str) -> Compiled | None:
        """Return what is kept under a key, if the compiler is still the one that made it."""
        if self._path is None:
            return None
        try:
            with _own(self._path, os.O_DIRECTORY), _own(self._path / f"{key}.json") as descriptor:
                with open(descriptor, "rb", closefd=False) as file:
                    compiler, compiled = _unpacked(key, file.read(_MOST_FILE_BYTES))
                with contextlib.suppress(OSError):
                    os.utime(descriptor)  # the last that was used
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(str(error))
            return None
        return compiled if all(_identity(path) == [path, *known] for path, *known in compiler) else None

    def put(self, key: str, compiled: Compiled, compiler: Iterable[str]) -> None:
        """Keep what was compiled, with the compiler's files; and not more than KEPT_FILES in all."""
        if self._path is None:
            return
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            with _own(self._path, os.O_DIRECTORY):
                _write(self._path / f"{key}.json", _packed(key, compiled, compiler))
                _prune(self._path)
        except (OSError, ValueError) as error:
            self._warn(str(error))

    def drop(self, key: str, reason: str) -> None:
        """Forget what the kernel has refused."""
        if self._path is not None:
            self._warn(f"refused by the kernel, and compiled afresh: {reason}")
            with contextlib.suppress(OSError):
                (self._path / f"{key}.json").unlink()

    def _warn(self, reason: str) -> None:
        warning = f"compiled programs: {reason}"
        if warning not in self.warnings:
            self.warnings.append(warning)


@contextlib.contextmanager
def _own(path: Path, flags: int = 0) -> Iterator[int]:
    """Open what is this user's, and nobody else may write to. Raises ValueError where it is not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"{path} is another user's, or others may write to it")
        yield descriptor
    finally:
        os.close(descriptor)


def _packed(key: str, compiled: Compiled, compiler: Iterable[str]) -> bytes:
    programs = {name: base64.b64encode(code).decode() for name, code in compiled.programs.items()}
    maps = [astuple(each) for each in compiled.maps]
    body = json.dumps({"compiler": [*map(_identity, compiler)], "maps": maps, "programs": programs}).encode()
    return _checksum(key, body) + b"\n" + body


def _unpacked(key: str, data: bytes) -> tuple[list[list[Any]], Compiled]:
    checksum, _, body = data.partition(b"\n")
    if checksum != _checksum(key, body):
        raise ValueError(f"{key}.json is damaged")
    try:
        known = statefile.parse(body)
        maps = [_map(each) for each in known["maps"]]
        programs = {name: base64.b64decode(code, validate=True) for name, code in known["programs"].items()}
        for code in programs.values():
            _with_maps(code, range(len(maps)).__getitem__)
        compiler = [[str(path), *known] for path, *known in known["compiler"]]
        return compiler, Compiled(maps, programs)
    except (LookupError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise ValueError(f"{key}.json is another version's") from error


def _map(fields: Sequence[Any]) -> sysbpf.MapInfo:
    """Raises ValueError or TypeError where these are not a map's."""
    info = sysbpf.MapInfo(*fields)
    *numbers, name = astuple(info)
    if not all(statefile.is_count(number, 1 << 32) for number in numbers) or not _MAP_NAME.fullmatch(name):
        raise ValueError(f"no map: {info}")
    return info


def _checksum(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).hexdigest().encode()


def _identity(path: str) -> list[Any]:
    try:
        status = os.stat(path)
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, mode 0600."""
    descriptor, fresh = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(fresh, path)
    except OSError:
        os.unlink(fresh)
        raise


def _prune(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process prunes too
        for path in sorted(folder.iterdir(), key=lambda path: path.lstat().st_mtime_ns, reverse=True)[KEPT_FILES:]:
            path.unlink()
