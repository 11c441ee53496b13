"""BTF: the running kernel's, and one made by hand with a known layout."""

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from producer.errors import UnavailableError
from producer.kernel.btf import FUNC, STRUCT, TYPEDEF, VMLINUX, Btf, kernel_header, missing
from producer.kernel.source import OPTIONAL, REQUIRED, WANTED

INT, PTR, ARRAY, UNION, CONST, FUNC_PROTO = 1, 2, 3, 5, 10, 13


class Blob:
    """Writes BTF, type by type; ids count from 1."""

    def __init__(self) -> None:
        self._strings = b"\0"
        self._types: list[bytes] = []

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = len(self._strings)
        self._strings += text.encode() + b"\0"
        return at

    def add(
        self, kind: int, name: str, size_or_type: int, *words: Sequence[int], vlen: int = 0, flag: bool = False
    ) -> int:
        info = kind << 24 | vlen | flag << 31
        tail = b"".join(struct.pack(f"<{len(each)}I", *each) for each in words)
        self._types.append(struct.pack("<III", self.name(name), info, size_or_type) + tail)
        return len(self._types)

    def struct(
        self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT, flag: bool = False
    ) -> int:
        words = [(self.name(member), type_id, offset) for member, type_id, offset in members]
        return self.add(kind, name, size, *words, vlen=len(members), flag=flag)

    def bytes(self) -> bytes:
        types = b"".join(self._types)
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(self._strings)) + (
            types + self._strings
        )


@pytest.fixture(scope="module")
def made() -> Btf:
    blob = Blob()
    u8, u32, u64 = (blob.add(INT, name, size, [size * 8]) for name, size in (("u8", 1), ("u32", 4), ("u64", 8)))
    const_u32 = blob.add(CONST, "", u32)
    inner = blob.struct("inner", 16, ("a", u64, 0), ("b", const_u32, 64))
    words = blob.add(ARRAY, "", 0, [u32, u32, 4])
    anonymous = blob.struct("", 8, ("deep", u32, 32), kind=UNION)
    pointer = blob.add(PTR, "", inner)
    blob.struct(
        "outer", 60,
        ("first", u8, 0), ("in", inner, 64), ("words", words, 192), ("", anonymous, 320), ("link", pointer, 384),
    )  # fmt: skip
    blob.struct("packed", 12, ("odd", u32, 8), ("in", inner, 40))
    blob.struct("flags", 4, ("low", u8, 3 << 24 | 0), ("high", u8, 5 << 24 | 3), ("plain", u8, 8), flag=True)
    blob.struct("torn", 4, ("over", u32, 5 << 24 | 6), flag=True)
    proto = blob.add(FUNC_PROTO, "", u32, (0, u32), (0, u64), (0, pointer), vlen=3)
    blob.add(FUNC, "function", proto)
    blob.add(TYPEDEF, "btf_trace_event", blob.add(PTR, "", proto))
    return Btf(blob.bytes())


def test_a_member_is_found_through_structs_and_anonymous_unions(made: Btf) -> None:
    def offset(path: str) -> int | None:
        member = made.member("outer", path)
        return None if member is None else member.bit_offset // 8

    assert offset("first") == 0
    assert offset("in.b") == 8 + 8
    assert offset("deep") == 40 + 4
    assert offset("link") == 48
    assert offset("in.c") is None
    assert offset("first.a") is None
    assert made.member("nothing", "a") is None


def test_parameters_of_a_function_and_a_tracepoint(made: Btf) -> None:
    function, tracepoint, inner = (
        made.find(FUNC, "function"),
        made.find(TYPEDEF, "btf_trace_event"),
        made.find(4, "inner"),
    )
    assert function is not None
    assert tracepoint is not None
    assert inner is not None
    assert made.params(function) == made.params(tracepoint) == 3
    with pytest.raises(ValueError, match="not a function"):
        made.params(inner)


def test_the_header_has_each_member_at_its_offset_in_its_size(made: Btf) -> None:
    header = kernel_header(made, {"outer": ("first", "in.b as b", "words", "in as whole", "link", "deep")})
    for line in (
        "struct { u8 first; };",
        "struct { u8 _b[16]; u32 b; };",
        "struct { u8 _words[24]; u32 words[4]; };",
        "struct { u8 _whole[8]; u8 whole[16]; };",
        "struct { u8 _link[48]; struct inner *link; };",
        "struct { u8 _deep[44]; u32 deep; };",
        '_Static_assert(__builtin_offsetof(struct outer, deep) == 44, "outer.deep");',
    ):
        assert line in header


def test_a_member_that_is_not_aligned_becomes_bytes(made: Btf) -> None:
    assert "struct { u8 _odd[1]; u8 odd[4]; };" in kernel_header(made, {"packed": ("odd",)})


def test_a_missing_member_is_a_macro(made: Btf) -> None:
    wanted = {"outer": ("first", "gone", "in.gone as lost"), "nowhere": ("x",)}
    header = kernel_header(made, wanted)
    assert "#define HAS_outer_first 1" in header
    assert "#define HAS_outer_gone 0" in header
    assert "#define HAS_outer_lost 0" in header
    assert "#define HAS_nowhere_x 0" in header
    assert "struct nowhere { union {\n\tu8 _nothing;\n}; };" in header
    assert missing(made, wanted) == ["outer.gone", "outer.lost", "nowhere.x"]


def test_a_bit_field_becomes_its_byte_and_a_macro(made: Btf) -> None:
    header = kernel_header(made, {"flags": ("high", "plain")})
    assert "#define high_bits(byte) ((byte) >> 3 & 31)" in header
    assert "struct { u8 high_byte; };" in header
    assert "struct { u8 _plain[1]; u8 plain; };" in header
    with pytest.raises(UnavailableError, match="across a byte boundary"):
        kernel_header(made, {"torn": ("over",)})


def test_something_other_than_btf_is_rejected() -> None:
    with pytest.raises(UnavailableError, match="not BTF"):
        Btf(bytes(64))


def test_truncated_btf_is_rejected(made: Btf) -> None:
    blob = Blob()
    blob.add(INT, "u8", 1, [8])
    Btf(blob.bytes())
    with pytest.raises(UnavailableError, match="truncated BTF"):
        Btf(blob.bytes()[:-1])


def elf(**sections: bytes) -> bytes:
    """Return a 64-bit ELF file with these sections, the table at its end, and the names in the last one."""
    content = bytearray(64)
    names = bytearray(b"\0")
    table = [bytes(64)]
    for name, data in {**sections, "shstrtab": b""}.items():
        at = len(names)
        names += f".{name}".encode() + b"\0"
        if name == "shstrtab":
            data = bytes(names)
        table.append(struct.pack("<IIQQQQ24x", at, 1, 0, 0, len(content), len(data)))
        content += data
    struct.pack_into("<4s36xQ10xHHH", content, 0, b"\x7fELF", len(content), 64, len(table), len(table) - 1)
    return bytes(content) + b"".join(table)


def test_the_btf_of_a_kernel_image_is_found(tmp_path: Path) -> None:
    blob = Blob()
    blob.add(FUNC, "tcp_sendmsg", 0)
    image = tmp_path / "vmlinux"
    image.write_bytes(elf(text=b"code", BTF=blob.bytes(), BTF_ids=b"more"))
    assert Btf.load(image).find(FUNC, "tcp_sendmsg") == 1
    for other in (elf(text=b"code"), image.read_bytes()[:-100], b"\x7fELF"):
        image.write_bytes(other)
        with pytest.raises(UnavailableError, match="not BTF"):
            Btf.load(image)


def test_an_unknown_kind_is_rejected() -> None:
    blob = Blob()
    blob.add(29, "future", 0)
    with pytest.raises(UnavailableError, match="kind 29"):
        Btf(blob.bytes())


def test_a_file_of_any_size_is_refused_at_once(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 10 << 30)
    with pytest.raises(UnavailableError, match="huge: not BTF: larger than 1024 MiB"):
        Btf.load(huge)


def test_without_btf_the_error_names_the_requirement(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="CONFIG_DEBUG_INFO_BTF"):
        Btf.load(tmp_path / "none")


needs_btf = pytest.mark.skipif(not VMLINUX.exists(), reason=f"{VMLINUX} is missing: this kernel has no BTF")


@needs_btf
def test_the_running_kernel_has_all_required_members() -> None:
    btf = Btf.load()
    assert missing(btf, REQUIRED) == []
    registers = {f"pt_regs.{name}" for name in ("di", "si", "dx", "cx", "r8", "ax", "sp", "regs")}
    other_versions = {"cgroup.ancestors", "cgroup.ancestor_ids", "sock.sk_cgroup", "sock.sk_cgroup_val"}
    assert set(missing(btf, OPTIONAL)) <= registers | other_versions, "those of another processor"


@needs_btf
def test_the_running_kernels_structs_have_what_never_changes() -> None:
    """Offsets that decades of programs rely on: the start of sock_common, and TCP's numbers in the skb."""
    header = kernel_header(Btf.load(), WANTED)
    assert "struct { u32 skc_daddr; };" in header
    assert "struct { u8 _skc_rcv_saddr[4]; u32 skc_rcv_saddr; };" in header
    assert "struct { u8 _skc_dport[12]; u16 skc_dport; };" in header
    assert "struct { u32 seq; };" in header
    assert re.search(r"u8 cb\[48\];", header)
    assert re.search(r"u32 skc_v6_daddr\[4\];", header)
