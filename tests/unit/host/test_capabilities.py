"""Filters of system calls, and SELinux, that forbid single calls."""

import errno
import os
import resource
from ctypes import set_errno

import pytest

from producer import cli
from producer.errors import PermissionDenied
from producer.host import capabilities
from producer.kernel.loader import check_descriptor_limit


def refuse(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_capabilities_that_cannot_be_dropped_end_a_start_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def capset(self, *_: object) -> int:
            set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(capabilities, "_libc", Libc())
    with pytest.raises(PermissionDenied, match="cannot drop capabilities: Operation not permitted: allow capset"):
        capabilities.drop_unneeded(lambda: None)


def test_limits_that_cannot_be_read_prevent_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", refuse)
    check_descriptor_limit()
    assert cli._may_cut_files()
    monkeypatch.undo()
    monkeypatch.setattr(os, "statvfs", refuse)
    assert cli._may_cut_files()
