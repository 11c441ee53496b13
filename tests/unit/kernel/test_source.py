"""The C source for bcc: one file, whose messages name the original files."""

import re
from pathlib import Path

import pytest

from producer.events import layout_check
from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.features import Features
from producer.kernel.source import macros, program_text
from producer.paths import BPF

pytestmark = pytest.mark.skipif(not VMLINUX.exists(), reason=f"{VMLINUX} is missing: this kernel has no BTF")


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf.load()


def located(text: str) -> dict[str, dict[int, str]]:
    """Yield each line of the text with its file and number according to #line."""
    files: dict[str, dict[int, str]] = {}
    name, number = "", 0
    for line in text.splitlines():
        if directive := re.fullmatch(r'#line (\d+) "(.*)"', line):
            name, number = directive[2], int(directive[1])
        else:
            files.setdefault(name, {})[number] = line
            number += 1
    return files


def test_line_directives_name_the_right_file_and_line(btf: Btf) -> None:
    files = located(program_text(BPF, btf, layout_check()))
    for path in [*BPF.glob("*.h"), BPF / "rebpf.bpf.c"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.startswith('#include "'):
                assert files[path.name][number] == line


def test_no_local_include_is_left_for_the_compiler(btf: Btf) -> None:
    text = program_text(BPF, btf, layout_check())
    assert not re.search(r'^#include "', text, flags=re.MULTILINE)
    assert "_Static_assert(sizeof(struct transmit_event)" in text


def test_macros_name_only_the_chosen_hooks(btf: Btf) -> None:
    features = Features(True, True, False, True, frozenset())
    flags = macros(btf, features, {"transmit": "cgroup_skb", "retransmit": "kprobe"}, 250)
    hooks = {flag for flag in flags if flag.startswith(("-DTRANSMIT_", "-DRETRANSMIT_")) and flag.endswith("=1")}
    assert hooks - {"-DRETRANSMIT_TRACEPOINT_HAS_ERR=1"} == {"-DTRANSMIT_CGROUP_SKB=1", "-DRETRANSMIT_KPROBE=1"}
    assert {"-DPROBE_READ=1", "-DHZ=250", "-DHAS_ATOMIC_FETCH=1", "-DHAS_TRACING_COOKIE=0"} <= set(flags)


def test_the_license_of_the_programs_is_one_that_the_helpers_accept() -> None:
    for path in [*BPF.glob("*.h"), *BPF.glob("*.c")]:
        assert "SPDX-License-Identifier: GPL-2.0" in Path(path).read_text().splitlines()[0]
