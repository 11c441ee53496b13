"""The kernel side as the agent sees it: which rungs are in use, the rings and maps, the counters, attach and detach.

The work is done by a child process (producer.loader); here are the descriptors that it hands over. Nothing is pinned, so the
last descriptor's end, also by kill -9, is the programs' end.
"""

import ctypes
import ipaddress
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from producer import errors, sysbpf
from producer.events import HOOKS, STREAMS, Stream, layout_check
from producer.loader import PACKET_BYTES
from producer.paths import BPF
from producer.ring import Ring
from producer.rungs import Refusal

logger = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PAGE_BYTES = 4096
_FDS = 64
_DEATH_SIGNAL, _SIGKILL = 1, 9
_SO_COOKIE = 57
_START_TIMEOUT_S = 300.0  # a virtual machine without KVM compiles for half a minute


@dataclass(frozen=True, slots=True)
class HookSettings:
    """What to hook and how; the ring sizes are powers of two, in bytes, by the ring's name."""

    hooks: tuple[str, ...] = HOOKS
    ring_bytes: Mapping[str, int] = field(default_factory=lambda: {"transmit_pipe": 1 << 24, "retransmit_pipe": 1 << 22})
    addresses: tuple[Address, ...] = ()
    ports: tuple[int, ...] = ()
    own_listeners: bool = False
    """Whether the agent itself listens (the embedded broker), and its accepted connections are to be left out."""
    btf: Path | None = None


@dataclass(frozen=True, slots=True)
class KernelCounters:
    """Events of one stream since the programs were loaded.

    `nested` counts runs that the kernel skipped because the program would have interrupted itself; it stands before the filter.
    """

    passed: int
    ring_full: int
    nested: int


class Hooks:
    """The loaded programs of both streams; `attach` starts them. A context manager: leaving it detaches."""

    def __init__(self, settings: HookSettings) -> None:
        self._settings = settings
        self._descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        self._programs: dict[str, list[int]] = {}
        self._links: list[int] = []
        self._cpus = sysbpf.possible_cpus()
        self.rungs: dict[str, str] = {}
        """The rung in use, by stream."""
        self.refusals: list[Refusal] = []
        """The better rungs, and why the host does not allow them."""

    def load(self) -> None:
        """Compile and load; raises HookError, PermissionDenied or UnavailableError with the reason in one line."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES)
        self._channel = ours
        with theirs:
            self._child = _start_loader(theirs)
        request = {
            "btf": str(self._settings.btf or ""),
            "bpf": str(BPF),
            "hooks": self._settings.hooks,
            "pages": {ring: size // _PAGE_BYTES for ring, size in self._settings.ring_bytes.items()},
            "filters": {
                "addresses": bool(self._settings.addresses),
                "ports": bool(self._settings.ports),
                "own_listeners": self._settings.own_listeners,
            },
            "layout_check": layout_check(),
        }
        ours.settimeout(_START_TIMEOUT_S)
        ours.send(json.dumps(request).encode())
        answer, descriptors = self._receive()
        self._descriptors = descriptors
        self.rungs = answer["rungs"]
        self.refusals = [Refusal(*each) for each in answer["refusals"]]
        count = len(answer["maps"])
        self._maps = dict(zip(answer["maps"], descriptors[:count], strict=True))
        for (stream, _), program in zip(answer["programs"], descriptors[count:], strict=True):
            self._programs.setdefault(stream, []).append(program)
        self._fill_filters()

    def attach(self) -> None:
        """Attach all programs; from here on events come."""
        self._channel.send(b"attach")
        _, self._links = self._receive()
        self._end_child()

    def detach(self) -> None:
        """Detach: no event comes after this. The rings and counters stay readable."""
        sysbpf.close_all(self._links)
        self._links = []

    def ring(self, stream: Stream) -> Ring:
        """Map the ring of a stream."""
        return Ring(self._maps[stream.ring], self._settings.ring_bytes[stream.ring], stream.dtype)

    def counters(self, stream: Stream) -> KernelCounters:
        """Read a stream's counters, summed over the CPUs."""
        words = sysbpf.lookup(self._maps["counters"], struct.pack("<I", stream.index), 16 * self._cpus)
        values = struct.unpack(f"<{2 * self._cpus}Q", words)
        nested = sum(sysbpf.program_info(program).recursion_misses for program in self._programs[stream.name])
        return KernelCounters(sum(values[::2]), sum(values[1::2]), nested)

    def program_infos(self, stream: Stream) -> list[sysbpf.ProgramInfo]:
        """Return the kernel's run statistics of the stream's programs."""
        return [sysbpf.program_info(program) for program in self._programs[stream.name]]

    def exclude_socket(self, descriptor: int) -> None:
        """Leave out what the socket `descriptor` sends, from now on. Call it before the socket connects."""
        own = socket.socket(fileno=os.dup(descriptor))
        with own:
            cookie = own.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        sysbpf.update(self._maps["own_sockets"], cookie, b"\1")

    def exclude_listener(self, address: Address, port: int) -> None:
        """Leave out what connections accepted on this local endpoint send, in the agent's network namespace."""
        namespace = os.stat("/proc/self/ns/net").st_ino
        sysbpf.update(self._maps["own_listeners"], _in6(address) + struct.pack("<II", namespace, port), b"\1")

    def close(self) -> None:
        """Detach and let go of everything."""
        self.detach()
        self._end_child()
        sysbpf.close_all(self._descriptors)
        self._descriptors = []

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill_filters(self) -> None:
        for address in self._settings.addresses:
            sysbpf.update(self._maps["addresses"], _in6(address), b"\1")
        for port in self._settings.ports:
            sysbpf.update(self._maps["ports"], struct.pack("<H", port), b"\1")

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._channel, PACKET_BYTES, _FDS)
        except TimeoutError as error:
            self._child.kill()
            raise errors.HookError("the loader has not answered within 5 minutes") from error
        if not packet:
            raise errors.HookError(f"the loader ended with status {self._child.wait()} and no answer")
        answer = json.loads(packet)
        if "error" in answer:
            if answer["log"]:
                logger.debug("loader log:\n%s", answer["log"])
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer, descriptors

    def _end_child(self) -> None:
        if hasattr(self, "_child"):
            self._channel.close()
            self._child.wait()


def _in6(address: Address) -> bytes:
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _start_loader(channel: socket.socket) -> "subprocess.Popen[bytes]":
    package = Path(__file__).resolve().parent.parent
    # The package's folder comes last: a venv's site-packages must not shadow the system Python's own.
    code = f"import sys; sys.path.append({str(package)!r}); from producer.loader import main; main({channel.fileno()})"
    quiet = None if logger.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL
    return subprocess.Popen(
        [_python_with_bcc(), "-c", code], pass_fds=[channel.fileno()], stderr=quiet, preexec_fn=_die_with_parent
    )


def _die_with_parent() -> None:
    """An agent killed while its loader compiles leaves no orphan."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, _SIGKILL)


def _python_with_bcc() -> str:
    """Return a Python that can import bcc: ours if it can, else the system's, where the distribution's package is."""
    candidates: Iterable[str | None] = (sys.executable, "/usr/bin/python3", shutil.which("python3"))
    for python in filter(None, candidates):
        if subprocess.run([python, "-c", "import bcc"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return python
    raise errors.UnavailableError("bcc is missing: install the package python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora)")
