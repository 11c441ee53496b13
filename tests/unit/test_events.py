"""bpf/events.h and the dtypes: one layout, read from the header by ctypes, which lays out as a C compiler does."""

import ctypes
import re
from typing import Any

import numpy as np
import pytest

from producer.events import CAUSES, FLOW, FLOW_EVENT, HOOKS, KNOWN, RETRANSMIT, SEGMENT, TRANSMIT, layout_check
from producer.paths import BPF

HEADER = re.sub(r"/\*.*?\*/", "", (BPF / "events.h").read_text(), flags=re.DOTALL)
TYPES: dict[str, Any] = {
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "s32": ctypes.c_int32,
}


def structs() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", HEADER, flags=re.DOTALL):
        fields = []
        for kind, member, count in re.findall(r"(?:struct )?(\w+) (\w+)(?:\[(\d+)\])?;", body):
            c_type = TYPES.get(kind) or found[kind]
            fields.append((member, c_type * int(count) if count else c_type))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flow", FLOW),
        ("segment", SEGMENT),
        ("transmit_event", TRANSMIT),
        ("retransmit_event", RETRANSMIT),
        ("flow_event", FLOW_EVENT),
    ],
)
def test_the_dtype_has_the_headers_members_offsets_and_sizes(name: str, dtype: np.dtype[np.void]) -> None:
    c_struct = structs()[name]
    in_c = [
        (member, getattr(c_struct, member).offset, getattr(c_struct, member).size) for member, _ in c_struct._fields_
    ]
    assert dtype.fields is not None
    assert in_c == [(member, offset, kind.itemsize) for member, (kind, offset, *_) in dtype.fields.items()]
    assert ctypes.sizeof(c_struct) == dtype.itemsize


@pytest.mark.parametrize("dtype", [FLOW, SEGMENT, TRANSMIT, RETRANSMIT, FLOW_EVENT])
def test_there_are_no_holes_so_every_byte_is_written(dtype: np.dtype[np.void]) -> None:
    assert dtype.fields is not None
    assert sum(kind.itemsize for kind, *_ in dtype.fields.values()) == dtype.itemsize
    assert dtype.itemsize % 8 == 0, "a record of a ring"


def test_the_values_names_are_the_headers() -> None:
    enums = {name: int(value) for name, value in re.findall(r"((?:HOOK|CAUSE)_\w+) = (\d+)", HEADER)}
    assert enums == {
        **{f"HOOK_{name.upper()}": number for number, name in enumerate(HOOKS)},
        **{f"CAUSE_{name.upper()}": number for number, name in enumerate(CAUSES)},
    }
    bits = {name: 1 << int(shift) for name, shift in re.findall(r"#define (KNOWN_\w+) \(1u << (\d+)\)", HEADER)}
    assert bits == {f"KNOWN_{name.upper()}": bit for name, bit in KNOWN.items()}


def test_the_compilers_check_names_each_member() -> None:
    check = layout_check()
    for struct, member, offset in (
        ("transmit_event", "s.flow.saddr", 0),
        ("retransmit_event", "s.mss", SEGMENT.fields["mss"][1] if SEGMENT.fields else -1),
        ("retransmit_event", "cause", RETRANSMIT.fields["cause"][1] if RETRANSMIT.fields else -1),
    ):
        assert f"__builtin_offsetof(struct {struct}, {member}) == {offset}," in check
