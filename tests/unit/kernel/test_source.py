"""The C source for bcc: one file, whose messages name the original files."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from producer.events import layout_check
from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.features import ITERATORS, Features
from producer.kernel.source import hook_macros, kernel_macros, made_for, made_of, program_text
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
    features = Features(True, True, False, True, frozenset(ITERATORS), frozenset())
    flags = hook_macros({"transmit": "cgroup_skb", "retransmit": "kprobe"}) + kernel_macros(btf, features)
    hooks = {flag for flag in flags if flag.startswith(("-DTRANSMIT_", "-DRETRANSMIT_")) and flag.endswith("=1")}
    assert hooks - {"-DRETRANSMIT_TRACEPOINT_HAS_ERR=1"} == {"-DTRANSMIT_CGROUP_SKB=1", "-DRETRANSMIT_KPROBE=1"}
    assert {"-DPROBE_READ=1", "-DHAS_ATOMIC_FETCH=1", "-DHAS_TRACING_COOKIE=0"} <= set(flags)


def test_layouts_and_features_make_programs_of_another_kernel_and_sources_those_of_another_version(
    btf: Btf, tmp_path: Path
) -> None:
    features = Features(True, True, True, True, frozenset(ITERATORS), frozenset())
    blob = VMLINUX.read_bytes()
    other = Btf(blob.replace(b"\0snd_cwnd\0", b"\0snd_cwmd\0"))
    assert made_for(btf, features) == made_for(Btf(blob), replace(features, split=None))
    assert made_for(btf, features) != made_for(other, features)
    assert made_for(btf, features) != made_for(btf, replace(features, tracing_cookie=False))

    folder = shutil.copytree(BPF, tmp_path / "bpf")
    assert made_of(folder, layout_check()) == made_of(BPF, layout_check())
    for path in (folder / "rules.h", folder / "shim/include/linux/types.h"):
        path.write_text(path.read_text() + "/* changed */\n")
        assert made_of(folder, layout_check()) != made_of(BPF, layout_check())
        shutil.copytree(BPF, folder, dirs_exist_ok=True)
    assert made_of(folder, "") != made_of(folder, layout_check())


def test_the_license_of_the_programs_is_one_that_the_helpers_accept() -> None:
    for path in [*BPF.glob("*.h"), *BPF.glob("*.c")]:
        assert "SPDX-License-Identifier: GPL-2.0" in Path(path).read_text().splitlines()[0]
