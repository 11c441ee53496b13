"""Functions that the compiler has split, by recorded kallsyms; and what the choice of hooks makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.features import ITERATORS, SOCKET_STORAGE, TASK_FILES, Features
from producer.kernel.hooks import HOOKS_BY_STREAM, Hook, Kernel, fitted, refusal
from producer.kernel.symbols import split_functions

# Debian 11, Linux 5.10.0-32-amd64. The part is called from its own function only.
BULLSEYE = """\
0000000000000000 t tcp_rtx_synack.part.0
0000000000000000 T tcp_rtx_synack
0000000000000000 T tcp_make_synack
0000000000000000 t __tcp_transmit_skb
0000000000000000 T __tcp_retransmit_skb
0000000000000000 T tcp_send_loss_probe
0000000000000000 T tcp_retransmit_skb
"""
# As on arm64, Debian 13, where tcp_send_loss_probe calls the part.
PART = """\
0000000000000000 t __tcp_transmit_skb
0000000000000000 t __tcp_retransmit_skb.part.0
0000000000000000 T __tcp_retransmit_skb
0000000000000000 T tcp_send_loss_probe
0000000000000000 T tcp_retransmit_skb
"""
HARMLESS = """\
0000000000000000 t tcp_retransmit_skb.cold
0000000000000000 t tcp_retransmit_skb.cold.12
0000000000000000 t __tcp_retransmit_skb.localalias
0000000000000000 t __tcp_transmit_skb.part.0\t[another_module]
0000000000000000 t __pfx___tcp_transmit_skb
"""
FENTRY, KPROBE = HOOKS_BY_STREAM["retransmit"][:2]


def features(split: frozenset[str] | None) -> Features:
    return Features(True, True, True, True, frozenset(ITERATORS), split)


def read(tmp_path: Path, text: str) -> frozenset[str] | None:
    (tmp_path / "kallsyms").write_text(text)
    return split_functions([tmp_path / "kallsyms"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (BULLSEYE, {"tcp_rtx_synack"}),
        (PART, {"__tcp_retransmit_skb"}),
        (HARMLESS, set()),
        ("0 t tcp_retransmit_skb.isra.0\n", {"tcp_retransmit_skb"}),
        ("0 t __tcp_transmit_skb.constprop.0.isra.0\n", {"__tcp_transmit_skb"}),
        ("0 t __tcp_transmit_skb.part.0.cold\n", {"__tcp_transmit_skb"}),
        ("0 t __tcp_transmit_skb.llvm.1234\n", {"__tcp_transmit_skb"}),
    ],
)
def test_parts_and_copies_are_found_and_cold_parts_ignored(tmp_path: Path, text: str, names: set[str]) -> None:
    assert set(read(tmp_path, text) or ()) == names


def test_symbols_that_cannot_be_read_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()  # as systemd hides a file
    assert split_functions([tmp_path / "missing", tmp_path / "empty"]) is None


def test_the_second_path_is_read_if_the_first_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "mount").write_text(PART)
    assert split_functions([tmp_path / "empty", tmp_path / "mount"]) == frozenset({"__tcp_retransmit_skb"})


@pytest.mark.parametrize(
    ("hook", "names"),
    [(FENTRY, ["fexit_inner_transmit_skb"]), (KPROBE, ["kprobe_inner_transmit_skb", "kretprobe_inner"])],
)
def test_a_split_inner_function_moves_the_probes_to_the_next_one(hook: Hook, names: list[str]) -> None:
    probes = fitted(hook, features(frozenset({"__tcp_retransmit_skb"}))).probes
    programs = {probe.program: probe.target for probe in probes}
    assert {programs[name] for name in names} == {"__tcp_transmit_skb"}
    assert "__tcp_retransmit_skb" not in programs.values()


def test_a_kernel_without_split_functions_changes_nothing() -> None:
    for hooks in HOOKS_BY_STREAM.values():
        for hook in hooks:
            assert fitted(hook, features(frozenset({"tcp_rtx_synack"}))) == hook


@pytest.mark.parametrize(
    ("iterators", "programs"),
    [
        ([SOCKET_STORAGE, TASK_FILES], {"iter_flow_states"}),
        ([TASK_FILES], {"iter_flow_files"}),
        ([SOCKET_STORAGE], {"iter_flow_states"}),
        ([], set()),
    ],
)
def test_connections_are_found_by_an_iterator_that_the_kernel_allows(iterators: list[str], programs: set[str]) -> None:
    (hook,) = HOOKS_BY_STREAM["flow"]
    allowed = replace(features(frozenset()), iterators=frozenset(iterators))
    found = {probe.program for probe in fitted(hook, allowed).probes}
    assert {program for program in found if program.startswith("iter_")} == programs
    assert "raw_tp_flow_state" in found


@pytest.mark.skipif(not VMLINUX.exists(), reason=f"{VMLINUX} is missing: this kernel has no BTF")
@pytest.mark.parametrize(
    ("hook", "split", "reason"),
    [
        (FENTRY, {"tcp_retransmit_skb"}, "tcp_retransmit_skb: the compiler has split the function"),
        (
            FENTRY,
            {"__tcp_retransmit_skb", "__tcp_transmit_skb"},
            "__tcp_transmit_skb: the compiler has split the function",
        ),
        (FENTRY, None, "/proc/kallsyms cannot be read"),
        (KPROBE, {"tcp_retransmit_skb"}, "tcp_retransmit_skb: the compiler has split the function"),
    ],
)
def test_a_hook_that_may_miss_calls_is_refused_with_the_reason(hook: Hook, split: set[str] | None, reason: str) -> None:
    seen = features(frozenset(split) if split is not None else None)
    found = refusal(fitted(hook, seen), Kernel(Btf.load(), seen, None, keeps=False))
    assert found is not None
    assert reason in found
