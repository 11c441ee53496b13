"""The features that a compilation for another kernel expects by its BTF are those that trials find."""

import errno
import os
import resource
from dataclasses import replace

import pytest

from producer.kernel.btf import Btf
from producer.kernel.features import Features, machine

pytestmark = pytest.mark.root


def test_features_by_btf_are_those_of_the_trials() -> None:
    btf = Btf.load()
    found = Features.find(btf)
    assert found.ring_buffer
    expected = Features.expected(btf)
    assert expected == replace(found, split=None, iterators=expected.iterators)
    assert expected.iterators >= found.iterators, "the kernel may refuse some"
    assert machine(btf) == os.uname().machine


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
