"""The library behind the bpf(2) commands."""

import pytest

from producer.errors import UnavailableError
from producer.kernel.bpf_syscall import libbpf


def test_a_missing_library_is_named_with_the_package_that_has_it() -> None:
    with pytest.raises(UnavailableError, match=r"libbpf\.so\.0none is missing: install the package libbpf1 "):
        libbpf("libbpf.so.0none")
