"""What the C library keeps. Each test is a process of its own, since the settings are of a whole process."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no arenas")

ARENAS = """
import ctypes, re, threading
from producer.host import memory
from tests.support.procfs import arenas
memory.configure()
libc = ctypes.CDLL(None)
allocated, seen = threading.Barrier(9), threading.Barrier(9)
def work():
    ctypes.CDLL(None).malloc(5000)
    allocated.wait()
    seen.wait()
for _ in range(8):
    threading.Thread(target=work).start()
allocated.wait()
print(arenas("self"))
seen.wait()
"""

RELEASED = """
import ctypes
from producer.host import memory
from tests.support.procfs import anonymous_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
before = anonymous_bytes("self")
blocks = [libc.malloc(32768) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 32768)
last = libc.malloc(32768)  # so that free() cannot shrink the heap
for block in blocks:
    libc.free(block)
print(anonymous_bytes("self") - before)
memory.release()
print(anonymous_bytes("self") - before)
"""

KEPT = """
import ctypes, resource, threading
from producer.host import memory
memory.configure()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
def use(sizes=[1 << 20, 3 << 20, 2 << 20, 4 << 20]):
    blocks = [libc.malloc(size) for size in sizes]
    for block, size in zip(blocks, sizes):
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
def work():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        use()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def numbers(script: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_many_threads_share_two_arenas() -> None:
    assert numbers(ARENAS) == [2]


def test_large_blocks_that_are_freed_and_needed_again_are_not_fetched_page_by_page() -> None:
    assert max(numbers(KEPT)) < 100  # of 2,560 pages


def test_released_memory_returns_to_the_kernel() -> None:
    kept, after = numbers(RELEASED)
    assert kept > 30_000_000 > 4_000_000 > after
