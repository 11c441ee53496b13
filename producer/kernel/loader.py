"""The agent's side of the loader process (producer.kernel.loader_child): start it, ask it, end it."""

import contextlib
import errno
import functools
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

from producer import errors
from producer.host import signals
from producer.kernel.loader_child import ATTACH, BCC_MISSING, FEW_DESCRIPTORS, PACKET_BYTES
from producer.paths import IMPORTED_FROM

logger = logging.getLogger(__name__)

_SYSTEM_PYTHON = "/usr/bin/python3"
_FDS = 64
_LEAST_DESCRIPTORS = 128
"""Programs, maps and links are up to 49, and Kafka, the spool and the endpoint need some."""
_MEMORY = "compiling takes 250 MB: raise MemoryMax= of the unit, or the container's limit"
_FIND_TIMEOUT_S = 60.0
_LOOK_S = 0.1
_MOST_LOG_BYTES = 1 << 16
_MOST_LINES = 20
"""Lines logged of the child's standard output and error; the last ones."""
# The child does not inherit our environment: CPATH, LD_*, PYTHON* and BCC_* would change what is compiled and loaded.
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_EXIT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 300.0  # a virtual machine without KVM compiles for half a minute


def check_descriptor_limit() -> None:
    """Raise UnavailableError if the limit is too low for the hooks and the rest of a producer."""
    try:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:  # a filter of system calls
        return
    if limit != resource.RLIM_INFINITY and limit < _LEAST_DESCRIPTORS:  # bcc would only report a compile error
        raise errors.UnavailableError(f"{FEW_DESCRIPTORS} (now {limit}, at least {_LEAST_DESCRIPTORS})")


class Loader:
    """The loader process, and the socket to it."""

    def __init__(self) -> None:
        check_descriptor_limit()
        try:
            with contextlib.ExitStack() as undo:
                self._start(undo)
                undo.pop_all()
        except OSError as error:
            few = error.errno in (errno.EMFILE, errno.ENFILE)
            raise errors.UnavailableError(FEW_DESCRIPTORS if few else f"cannot start the loader: {error}") from error

    def _start(self, undo: contextlib.ExitStack) -> None:
        self._channel, theirs = map(undo.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        # Python, bcc and LLVM write here; `end` turns it into log lines.
        self._output = undo.enter_context(os.fdopen(os.memfd_create("output"), "rb"))
        # Import this package, not another installed copy, and nothing else from its folder: the site-packages of a venv
        # must not shadow those of the system's Python.
        code = f"import sys; sys.path.insert(0, {str(IMPORTED_FROM)!r}); import producer; del sys.path[0]"
        code += f"; from producer.kernel.loader_child import main; main({theirs.fileno()}, {os.getpid()})"
        # Isolated (-I): a program that runs as root must not import from the working directory or PYTHONPATH.
        self._child = subprocess.Popen(
            [_python(), "-B", "-I", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs.fileno()],
            env=_ENVIRONMENT,
            process_group=0,  # a terminal's Ctrl-C is for us
        )
        theirs.close()

    def ask(self, request: Mapping[str, Any], timeout_s: float = _ANSWER_TIMEOUT_S) -> tuple[dict[str, Any], list[int]]:
        """Send a request; return the answer and the descriptors that come with it.

        Raises Stopped if a signal stops this process meanwhile, except while hooks are attached, which is short.
        """
        try:
            self._channel.settimeout(timeout_s)
            self._channel.send(json.dumps(request).encode())
            self._wait(timeout_s, stoppable=request != ATTACH)
            packet, descriptors, flags, _ = socket.recv_fds(self._channel, PACKET_BYTES, _FDS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            packet, descriptors, flags = b"", [], 0
        if flags & socket.MSG_CTRUNC:  # RLIMIT_NOFILE: the kernel has dropped some
            for descriptor in descriptors:
                os.close(descriptor)
            raise errors.UnavailableError(FEW_DESCRIPTORS)
        if not packet:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_EXIT_TIMEOUT_S)
            status = self._child.poll()
            if status == -signal.SIGKILL:  # the kernel ends the largest process of a container or unit
                raise errors.HookError(f"the loader was killed, perhaps because memory ran out: {_MEMORY}")
            how = "closed its socket" if status is None else f"exited with status {status}"
            raise errors.HookError(f"the loader {how} without an answer")
        with open(descriptors[0], "rb") as file:
            if log := _end_of(file):
                logger.debug("loader log:\n%s", log)
        answer = json.loads(packet)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer, descriptors[1:]

    def _wait(self, timeout_s: float, *, stoppable: bool) -> None:
        """Wait until the child has answered or exited."""
        deadline_s = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while not poll.poll(_LOOK_S * 1000):
            if stoppable and signals.is_stopping():
                raise errors.Stopped("stopped while the BPF programs were compiled and loaded")
            if time.monotonic() >= deadline_s:
                raise errors.HookError(f"the loader did not answer within {timeout_s:.0f} s")

    def end(self) -> None:
        """Kill the process, even while it works, which also closes its copies of the descriptors."""
        self._channel.close()
        self._child.kill()
        self._child.wait()
        with self._output:
            for line in _end_of(self._output).splitlines()[-_MOST_LINES:]:
                logger.warning("loader: %s", line)


def _end_of(log: BinaryIO) -> str:
    """Return the last part of a log."""
    log.seek(max(0, os.fstat(log.fileno()).st_size - _MOST_LOG_BYTES))
    return log.read().decode(errors="replace")


def _python() -> str:
    try:
        return python_with_bcc()
    except errors.UnavailableError:  # enough for programs that are compiled already; otherwise the child says so
        return sys.executable


@functools.cache
def python_with_bcc() -> str:
    """Return a Python that can import bcc: the system's, which has the distribution's package, or ours.

    The system's is tried first because it starts faster than a venv's.
    """
    for python in (_SYSTEM_PYTHON, sys.executable, shutil.which("python3")):
        if python and _has_bcc(python):
            return python
    raise errors.UnavailableError(BCC_MISSING)


# The package named bcc on PyPI is unrelated, and has no libbcc.py.
_FIND_BCC = """
import importlib.util, os.path, sys
found = importlib.util.find_spec("bcc")
sys.exit(not (found and os.path.exists(os.path.join(os.path.dirname(found.origin), "libbcc.py"))))
"""


def _has_bcc(python: str) -> bool:
    command = [python, "-I", "-c", _FIND_BCC]
    try:
        found = subprocess.run(
            command, stderr=subprocess.DEVNULL, env=_ENVIRONMENT, timeout=_FIND_TIMEOUT_S, process_group=0
        )
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0
