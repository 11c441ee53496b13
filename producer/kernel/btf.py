"""Struct layouts of the running kernel, read from its BTF, and the C header generated from them.

A host needs no kernel headers: `kernel_header` declares only the structs and members that the programs use, each at its
true offset. A member that this kernel lacks is omitted, and the macro HAS_<struct>_<member> is 0.

BTF: Documentation/bpf/btf.rst of the kernel. Standard library only, because the loader's child runs on the system's
Python.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from producer.errors import UnavailableError
from producer.host import state_file

VMLINUX = Path("/sys/kernel/btf/vmlinux")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)
_MODIFIERS = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}

# Bytes after the 12 of each type: fixed, and for each of its `vlen` entries.
_TAIL = {
    INT: (4, 0), PTR: (0, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FWD: (0, 0),
    TYPEDEF: (0, 0), VOLATILE: (0, 0), CONST: (0, 0), RESTRICT: (0, 0), FUNC: (0, 0), FUNC_PROTO: (0, 8),
    VAR: (4, 0), DATASEC: (0, 12), FLOAT: (0, 0), DECL_TAG: (4, 0), TYPE_TAG: (0, 0), ENUM64: (0, 12),
}  # fmt: skip
_MOST_BYTES = 1 << 30
"""Maximum size of a file: a vmlinux with all debug information has less."""
_UNITS = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}


@dataclass(frozen=True, slots=True)
class Member:
    """A member's position, in bits from the start of its struct. `bits` is 0 unless it is a bit field."""

    bit_offset: int
    bits: int
    type_id: int


class Btf:
    """The types of one BTF blob. `find` and `member` return None if the kernel lacks the type or member."""

    def __init__(self, blob: bytes) -> None:
        magic, _, _, header, type_off, type_len, str_off, str_len = struct.unpack_from(
            "<HBBIIIII", blob.ljust(24, b"\0")
        )
        if magic != 0xEB9F:
            raise UnavailableError("not BTF: wrong magic number (big-endian kernels are not supported)")
        if len(blob) < header + max(type_off + type_len, str_off + str_len):
            raise UnavailableError("truncated BTF: copy the file again")
        self._blob = blob
        self._strings = header + str_off
        self._at = [0]
        self._ids: dict[tuple[int, str], int] = {}
        at, end = header + type_off, header + type_off + type_len
        unpack = struct.Struct("<II").unpack_from
        while at < end:
            name, info = unpack(blob, at)
            kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
            if name and kind in (STRUCT, FUNC, TYPEDEF):
                self._ids.setdefault((kind, self._string(name)), len(self._at))
            self._at.append(at)
            if kind not in _TAIL:
                raise UnavailableError(f"this kernel's BTF has types of kind {kind}, which this version cannot read")
            fixed, each = _TAIL[kind]
            at += 12 + fixed + each * vlen

    @classmethod
    def load(cls, path: Path = VMLINUX) -> "Btf":
        """Read BTF, also from an uncompressed vmlinux. UnavailableError with the fix if there is none."""
        try:
            state_file.check_ordinary(path)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size  # of /proc/kmsg, which is regular and has no end: 0
                if size > _MOST_BYTES:
                    raise UnavailableError(f"not BTF: larger than {_MOST_BYTES >> 20} MiB")
                blob = file.read(size)
            return cls(_section(blob, b".BTF") if blob.startswith(b"\x7fELF") else blob)
        except FileNotFoundError as error:
            raise UnavailableError(
                f"{path} is missing: ReBPF needs a kernel built with CONFIG_DEBUG_INFO_BTF=y (Linux 5.10 or later)"
            ) from error
        except OSError as error:
            raise UnavailableError(f"{path}: {error.strerror}") from error
        except UnavailableError as error:
            raise UnavailableError(f"{path}: {error}") from error
        except (struct.error, ValueError) as error:
            raise UnavailableError(f"{path}: damaged BTF: {error}") from error

    def find(self, kind: int, name: str) -> int | None:
        """Return the type id of the first type of that kind and name."""
        return self._ids.get((kind, name))

    def params(self, type_id: int) -> int:
        """Return the number of parameters of a function, or of a typedef of a pointer to one."""
        kind, vlen, inner = self._type(type_id)
        while kind != FUNC_PROTO:
            if kind not in (FUNC, TYPEDEF, PTR):
                raise ValueError(f"type {type_id} is not a function")
            kind, vlen, inner = self._type(inner)
        return vlen

    def member(self, struct_name: str, path: str) -> Member | None:
        """Find `a.b.c` in a struct, through anonymous structs and unions."""
        type_id = self.find(STRUCT, struct_name)
        offset, found = 0, None
        for name in path.split("."):
            found = None if type_id is None else self._lookup(type_id, name)
            if found is None:
                return None
            offset += found.bit_offset
            type_id = self._strip(found.type_id)
        return None if found is None else Member(offset, found.bits, found.type_id)

    def pointee(self, type_id: int) -> str | None:
        """Return the name of the struct that a pointer type points to, or None for other types."""
        kind, _, inner = self._type(self._strip(type_id))
        if kind != PTR:
            return None
        target = self._strip(inner)
        return self._name(target) if target and self._type(target)[0] in (STRUCT, FWD) else "void"

    def shape(self, type_id: int) -> tuple[int, int]:
        """Return the number of elements of an array type and their size in bytes; (1, size) for other types."""
        type_id = self._strip(type_id)
        kind, _, size = self._type(type_id)
        if kind == PTR:
            return 1, 8
        if kind == ARRAY:
            element, _, count = struct.unpack_from("<III", self._blob, self._at[type_id] + 12)
            inner_count, inner_size = self.shape(element)
            return count * inner_count, inner_size
        return 1, size

    def _lookup(self, type_id: int, name: str) -> Member | None:
        kind, vlen, _ = self._type(type_id)
        if kind not in (STRUCT, UNION):
            return None
        flag = struct.unpack_from("<I", self._blob, self._at[type_id] + 4)[0] >> 31
        for i in range(vlen):
            name_off, inner, offset = struct.unpack_from("<III", self._blob, self._at[type_id] + 12 + 12 * i)
            bits, offset = (offset >> 24, offset & 0xFFFFFF) if flag else (0, offset)
            if name_off:
                if self._string(name_off) == name:
                    return Member(offset, bits, inner)
            elif deeper := self._lookup(self._strip(inner), name):
                return Member(offset + deeper.bit_offset, deeper.bits, deeper.type_id)
        return None

    def _strip(self, type_id: int) -> int:
        while type_id:
            kind, _, inner = self._type(type_id)
            if kind not in _MODIFIERS:
                break
            type_id = inner
        return type_id

    def _type(self, type_id: int) -> tuple[int, int, int]:
        _, info, size_or_type = struct.unpack_from("<III", self._blob, self._at[type_id])
        return info >> 24 & 0x1F, info & 0xFFFF, size_or_type

    def _name(self, type_id: int) -> str:
        return self._string(struct.unpack_from("<I", self._blob, self._at[type_id])[0])

    def _string(self, offset: int) -> str:
        start = self._strings + offset
        return self._blob[start : self._blob.index(b"\0", start)].decode()


def _section(elf: bytes, name: bytes) -> bytes:
    """Return a section of a 64-bit ELF file; empty if there is none."""
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
        sections = [struct.unpack_from("<II8x8xQQ", elf, table + size * i) for i in range(count)]
        for name_at, _, offset, length in sections:
            at = sections[names][2] + name_at
            if elf[at : at + len(name) + 1] == name + b"\0":
                return elf[offset : offset + length]
    except (struct.error, IndexError):  # truncated
        pass
    return b""


def kernel_header(btf: Btf, wanted: Mapping[str, Iterable[str]]) -> str:
    """Return C that declares each struct in `wanted` with the wanted members at their true offsets.

    A member is a path, `a.b`, optionally with a name for C: `a.b as name`. Each is an arm of a union, after padding up
    to its offset, so that members may overlap as in the kernel. A member of struct type becomes bytes. A bit field `f`
    becomes the byte `f_byte`, and `f_bits(byte)` extracts the field.
    """
    lines = [f"struct {name};" for name in wanted]
    for name, specs in wanted.items():
        arms, checks = [], []
        for alias, member in _members(btf, name, specs):
            lines.append(f"#define HAS_{name}_{alias} {int(member is not None)}")
            if member is None:
                continue
            offset = member.bit_offset // 8
            if member.bits:
                lines.append(_bit_field(alias, member))
                alias += "_byte"
            padding = f"u8 _{alias}[{offset}]; " if offset else ""
            arms.append(f"struct {{ {padding}{_declaration(btf, alias, member)}; }};")
            checks.append(f'_Static_assert(__builtin_offsetof(struct {name}, {alias}) == {offset}, "{name}.{alias}");')
        body = "\n\t".join(arms) or "u8 _nothing;"
        lines += [f"struct {name} {{ union {{\n\t{body}\n}}; }};", *checks]
    return "\n".join(lines) + "\n"


def missing(btf: Btf, wanted: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the wanted members that this kernel lacks, as `struct.member`."""
    found = ((name, *each) for name, specs in wanted.items() for each in _members(btf, name, specs))
    return [f"{name}.{alias}" for name, alias, member in found if member is None]


def _members(btf: Btf, name: str, specs: Iterable[str]) -> Iterator[tuple[str, Member | None]]:
    for spec in specs:
        path, _, alias = spec.partition(" as ")
        yield alias or path.rpartition(".")[2], btf.member(name, path)


def _bit_field(alias: str, member: Member) -> str:
    shift = member.bit_offset % 8
    if shift + member.bits > 8:
        raise UnavailableError(f"{alias}: bit fields across a byte boundary are not supported")
    return f"#define {alias}_bits(byte) ((byte) >> {shift} & {(1 << member.bits) - 1})"


def _declaration(btf: Btf, alias: str, member: Member) -> str:
    if member.bits:
        return f"u8 {alias}"
    if pointee := btf.pointee(member.type_id):
        return f"{'void' if pointee == 'void' else f'struct {pointee}'} *{alias}"
    count, size = btf.shape(member.type_id)
    if size not in _UNITS or member.bit_offset // 8 % size:
        count, size = count * size, 1
    return f"{_UNITS[size]} {alias}" + (f"[{count}]" if count > 1 else "")
