"""The features that a compilation for another kernel expects by its BTF are those that trials find."""

import errno
import os
import resource
from dataclasses import replace

import pytest

from producer.commands.check import _hooks
from producer.config.load import Config
from producer.kernel import bpf_syscall, loader_child
from producer.kernel.btf import Btf
from producer.kernel.features import Features, machine
from producer.kernel.hooks import NO_ITERATORS, Kernel
from producer.paths import BPF

pytestmark = pytest.mark.root


def test_features_by_btf_are_those_of_the_trials() -> None:
    btf = Btf.load()
    found = Features.find(btf)
    assert found.ring_buffer
    expected = Features.expected(btf)
    assert expected == replace(found, split=None, iterators=expected.iterators)
    assert expected.iterators >= found.iterators, "the kernel may refuse some"
    assert machine(btf) == os.uname().machine


def test_a_kernel_without_iterators_is_one_line_of_the_log_and_of_check(monkeypatch: pytest.MonkeyPatch) -> None:
    features = replace(Features.find(Btf.load()), iterators=frozenset())
    monkeypatch.setattr(Features, "find", classmethod(lambda cls, btf: features))
    monkeypatch.setattr(loader_child._Loaded, "_load", lambda *_: None)
    request = {
        "streams": ["flow"], "hooks": [], "ring_bytes": {}, "cache": None, "programs": None, "version": "",
        "bpf": str(BPF), "layout_check": "",
    }  # fmt: skip
    loaded = loader_child._Loaded(request, Kernel(Btf.load(), features, None, keeps=False))
    assert loaded.warnings == [NO_ITERATORS]
    assert [str(found) for found in _hooks(Config(), Btf.load(), None)][-1] == f"no      iterators: {NO_ITERATORS}"


def test_a_limit_on_descriptors_is_not_taken_for_an_old_kernel() -> None:
    btf = Btf.load()
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, usual[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as raised:
            Features.find(btf)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert raised.value.errno == errno.EMFILE


def test_a_rejected_program_with_a_long_log_has_the_verifiers_reason() -> None:
    valid = bpf_syscall.instruction(0xB7, 0, 0, 0, 0)
    not_set = bpf_syscall.instruction(0xBF, 0, 5, 0, 0)
    code = 60_000 * valid + not_set + bpf_syscall.RETURN_1
    with pytest.raises(bpf_syscall.VerifierError, match=r"^trial: Permission denied: R5 !read_ok$") as raised:
        bpf_syscall.load_program(
            "trial", code, bpf_syscall.PROG_CGROUP_SKB, attach_type=bpf_syscall.ATTACH_CGROUP_EGRESS
        )
    assert len(raised.value.log) > 1 << 20
