"""Failures of the environment, in any call: limits on memory, processes and files, and hidden files of the kernel."""

import contextlib
import errno
import os
import threading

from producer.errors import UnavailableError

_THREADS = 8
_LIMITS = {
    errno.ENOMEM: "memory: raise MemoryMax= of the unit, or ulimit -v",
    errno.EAGAIN: "processes and threads: raise TasksMax= of the unit, or ulimit -u",
    errno.EMFILE: "file descriptors: raise LimitNOFILE= of the unit, or ulimit -n",
    errno.ENFILE: "file descriptors of the host: raise fs.file-max by sysctl",
}


def exhausted(error: BaseException) -> str:
    """Return the limit that an exception is about, with the fix; empty for other exceptions."""
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and str(error).startswith("can't start new thread"):
        number = errno.EAGAIN
    limit = _LIMITS.get(number) if isinstance(number, int) else None
    return f"the limit on {limit}" if limit else ""


def hidden(error: BaseException) -> str:
    """Return which of the kernel's files an exception reports as missing, as in a container; empty for others."""
    path = getattr(error, "filename", None)
    if not isinstance(error, FileNotFoundError | PermissionError) or not str(path).startswith(("/proc/", "/sys/")):
        return ""
    return f"{path}: {error.strerror}: mount /proc and /sys, with all of their files (ProcSubset=all)"


def check_threads() -> None:
    """Raise UnavailableError if some threads cannot be started now: without them, librdkafka aborts the process."""
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(_THREADS)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        raise UnavailableError(exhausted(error)) from error
    finally:
        done.set()
    for thread in threads:
        thread.join()


def check_descriptors(count: int) -> None:
    """Raise UnavailableError if there are not this many free descriptors."""
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(count):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise UnavailableError(exhausted(error) or str(error)) from error
