"""The features that a compilation for another kernel expects by its BTF are those that trials find."""

import os
from dataclasses import replace

import pytest

from producer.kernel.btf import Btf
from producer.kernel.features import Features, machine

pytestmark = pytest.mark.root


def test_features_by_btf_are_those_of_the_trials() -> None:
    btf = Btf.load()
    found = Features.find(btf)
    assert found.ring_buffer
    assert Features.expected(btf) == replace(found, split=None)
    assert machine(btf) == os.uname().machine
