"""Keeps the memory of a process that runs for long small, and from growing by fragmentation."""

import ctypes
import importlib
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_ARENAS = 2
_KEPT_BYTES = 16 << 20

_libc = ctypes.CDLL(None)


def configure() -> None:
    """Let all threads share two arenas, which keep what is freed until `release`. Call this before threads start.

    With glibc, each new thread gets another arena by default, up to eight per CPU, and each keeps free memory between
    what is in use. librdkafka's threads come and go with clients and brokers: after 30 replaced clients that were 13
    MB.

    By default free() also returns large blocks, and what is free at an arena's end. librdkafka frees some MB after each
    request; to get them back page by page was a fifth of the CPU at 60,000 events/s.
    """
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def import_lean() -> None:
    """Import tenacity without tornado, which it imports where that is installed: 5 MB that no producer uses."""
    if "tornado" in sys.modules:
        return
    sys.modules["tornado"] = None  # type: ignore[assignment]  # so that its import fails
    try:
        importlib.import_module("tenacity")
    finally:
        del sys.modules["tornado"]


def release() -> None:
    """Return free memory to the kernel, in less than a millisecond."""
    if malloc_trim := getattr(_libc, "malloc_trim", None):
        malloc_trim(0)
