"""Keeps the memory of a process that runs for long from growing by fragmentation, where the C library is glibc."""

import ctypes

_M_ARENA_MAX = -8  # malloc.h
_ARENAS = 2

_libc = ctypes.CDLL(None)


def limit_arenas() -> None:
    """Let all threads share two arenas. Call this before threads start.

    By default each new thread gets another arena, up to eight per CPU, and each keeps free memory between what is in
    use. librdkafka's threads come and go with clients and brokers: after 30 replaced clients that were 13 MB.
    """
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(_M_ARENA_MAX, _ARENAS)


def release() -> None:
    """Return free memory to the kernel, in less than a millisecond."""
    if malloc_trim := getattr(_libc, "malloc_trim", None):
        malloc_trim(0)
