"""The library behind the bpf(2) commands."""

import ctypes
from pathlib import Path

import pytest

from producer.errors import UnavailableError
from producer.kernel import bpf_syscall
from producer.kernel.bpf_syscall import libbpf


def test_a_missing_library_is_named_with_the_package_that_has_it() -> None:
    with pytest.raises(UnavailableError, match=r"libbpf\.so\.0none is missing: install the package libbpf1 "):
        libbpf("libbpf.so.0none")


@pytest.mark.parametrize("machine", ["riscv64", "s390x", "i686"])
def test_other_processors_are_refused_by_name(machine: str) -> None:
    with pytest.raises(UnavailableError, match=f"{machine} is not supported: ReBPF runs on x86_64 and aarch64"):
        bpf_syscall.check_machine(machine)


def test_a_kernel_without_kprobes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bpf_syscall, "_KPROBES", tmp_path / "missing")
    with pytest.raises(LookupError, match="this kernel has no kprobes"):
        bpf_syscall.attach_kprobe(-1, "tcp_retransmit_skb", on_return=True, by_link=True)


def test_the_kernels_own_error_number_has_a_text() -> None:
    ctypes.set_errno(524)
    assert "fentry on arm64 needs Linux 6.4" in str(bpf_syscall._last_error())
