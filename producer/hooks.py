"""The kernel side as the agent sees it: which rungs are in use, the rings and maps, the counters, attach and detach.

The work is done by a child process (producer.loader); here are the descriptors that it hands over. Unless they are kept
in a bpffs (producer.pins), the last descriptor's end, also by kill -9, is the programs' end.
"""

import hashlib
import ipaddress
import json
import logging
import mmap
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from producer import errors, sysbpf
from producer.events import HOOKS, STREAMS, Stream, layout_check
from producer.loader import ATTACH, BCC_MISSING, PACKET_BYTES
from producer.paths import BPF
from producer.pins import PinFolder
from producer.ring import Ring
from producer.rulemaps import RuleMaps
from producer.rules import Action, Tables, tables
from producer.rungs import Refusal

logger = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_COUNTERS = struct.Struct("<3Q")
"""struct counters: passed, lost_ring_full, seq."""
_FDS = 64
_SO_COOKIE = 57
_ANSWER_TIMEOUT_S = 300.0  # a virtual machine without KVM compiles for half a minute


@dataclass(frozen=True, slots=True)
class HookSettings:
    """What to hook and how. The ring sizes are in bytes, by the ring's name: powers of two, a page or more.

    Raises ConfigError where a value cannot be.
    """

    hooks: tuple[str, ...] = HOOKS
    ring_bytes: Mapping[str, int] = field(
        default_factory=lambda: {"transmit_pipe": 1 << 24, "retransmit_pipe": 1 << 22}
    )
    rules: Tables = field(default_factory=lambda: tables((), Action()))
    """What becomes events; all of it, unless told otherwise."""
    own_listeners: bool = False
    """Whether the agent itself listens (the embedded broker), and its accepted connections are to be left out."""
    btf: Path | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.hooks) - set(HOOKS):
            raise errors.ConfigError(f"unknown hook {min(unknown)!r}: the hooks are {', '.join(HOOKS)}")
        for ring, size in self.ring_bytes.items():
            if size & (size - 1) or not mmap.PAGESIZE <= size <= 1 << 30:
                raise errors.ConfigError(f"{ring}: {size} bytes is no power of two from a page to 1 GiB")


@dataclass(frozen=True, slots=True)
class KernelCounters:
    """Events of one stream since the programs were loaded.

    `nested` counts runs that the kernel skipped because the program would have interrupted itself; it stands before the
    filter.
    """

    passed: int
    ring_full: int
    nested: int


class Numbers(Protocol):
    """What says where the numbers of events begin, by stream and possible CPU."""

    def start(self, *, overlap: bool) -> Mapping[str, Sequence[int]]:
        """Return the numbers before the first; with `overlap`, other programs are giving numbers."""

    def in_use(self) -> None:
        """Note that programs which were taken over are giving numbers."""

    def stop(self, last: Mapping[str, Sequence[int]]) -> None:
        """Note the last numbers."""


class Hooks:
    """The loaded programs of both streams; `attach` starts them. A context manager: leaving it detaches.

    Without `numbers`, the events' begin at 1.
    """

    def __init__(self, settings: HookSettings, pins: PinFolder | None = None, numbers: Numbers | None = None) -> None:
        self._settings = settings
        self._pins = pins
        self._numbers = numbers
        self.taken_over = False
        """Whether the programs were attached by another process, and have been all the time since."""
        self._descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        self._programs: dict[str, list[int]] = {}
        self._links: list[int] = []
        self._loader: _Loader | None = None
        self._cpus = sysbpf.possible_cpus()
        self.rungs: dict[str, str] = {}
        """The rung in use, by stream."""
        self.refusals: list[Refusal] = []
        """The better rungs, and why the host does not allow them."""

    def load(self) -> None:
        """Compile and load, or take over what is kept in `pins`, if that is the same that would be loaded.

        Raises HookError, PermissionDenied or UnavailableError with the reason in one line.
        """
        manifest = self._pins.manifest() if self._pins else None
        if manifest is not None and manifest["fingerprint"] == self._fingerprint():
            self._take_over(manifest)
        else:
            if manifest is not None:
                logger.warning("hooks that were kept are given up, since they are not the same: their events are lost")
            self._load()
        self._rules = RuleMaps(self._maps)
        self._rules.put(self._settings.rules)

    def _load(self) -> None:
        settings = self._settings
        self._loader = _Loader()
        answer, descriptors = self._loader.ask(
            {
                "btf": str(settings.btf or ""),
                "bpf": str(BPF),
                "hooks": settings.hooks,
                "pages": {ring: size // mmap.PAGESIZE for ring, size in settings.ring_bytes.items()},
                "own_listeners": settings.own_listeners,
                "layout_check": layout_check(),
            }
        )
        self._descriptors = descriptors
        self.rungs = answer["rungs"]
        self.refusals = [Refusal(*each) for each in answer["refusals"]]
        count = len(answer["maps"])
        self._maps = dict(zip(answer["maps"], descriptors[:count], strict=True))
        for stream, program in zip(answer["programs"], descriptors[count:], strict=True):
            self._programs.setdefault(stream, []).append(program)

    def _take_over(self, manifest: Mapping[str, Any]) -> None:
        assert self._pins is not None
        self.taken_over = True
        self.rungs = manifest["rungs"]
        self.refusals = [Refusal(*each) for each in manifest["refusals"]]
        self._descriptors = self._pins.open(manifest["maps"])
        self._maps = dict(zip(manifest["maps"], self._descriptors, strict=True))
        for stream, names in manifest["programs"].items():
            self._programs[stream] = self._pins.open(names)
            self._descriptors = [*self._descriptors, *self._programs[stream]]
        self._links = self._pins.open(manifest["links"])

    def _keep(self) -> None:
        assert self._pins is not None
        programs = {
            stream: {f"{stream}_{i}": program for i, program in enumerate(programs)}
            for stream, programs in self._programs.items()
        }
        links = {f"link_{i}": link for i, link in enumerate(self._links)}
        objects = {**self._maps, **links}
        for named in programs.values():
            objects.update(named)
        self._pins.keep(
            objects,
            {
                "fingerprint": self._fingerprint(),
                "rungs": self.rungs,
                "refusals": [(refusal.stream, refusal.rung, refusal.reason) for refusal in self.refusals],
                "maps": list(self._maps),
                "programs": {stream: list(named) for stream, named in programs.items()},
                "links": list(links),
            },
        )

    def _fingerprint(self) -> str:
        """Return a digest of all that the programs and maps are made of, but for the rules, which can be changed."""
        settings = self._settings
        made_of = [settings.hooks, dict(settings.ring_bytes), settings.own_listeners, str(settings.btf), layout_check()]
        digest = hashlib.sha256(json.dumps(made_of).encode())
        for path in sorted(BPF.rglob("*.[ch]")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def attach(self) -> None:
        """Attach all programs; from here on events come. What was taken over is attached already."""
        if self.taken_over:
            if self._numbers:
                self._numbers.in_use()
            return
        if self._loader is None:
            raise ValueError("attach comes once, after load")
        if self._numbers:
            self._seed(self._numbers.start(overlap=False))
        _, self._links = self._loader.ask(ATTACH)
        self._end_loader()
        if self._pins:
            self._keep()

    def detach(self) -> None:
        """Detach, and keep nothing: no event comes after this. The rings and counters stay readable."""
        if not self._links:
            return
        # The kernel may end a link a moment after its last descriptor; a program that runs until then takes nothing.
        sysbpf.update(self._maps["rules_active"], struct.pack("<I", 0), struct.pack("<Q", 0))
        if self._pins:
            self._pins.clear()
        sysbpf.close_all(self._links)
        self._links = []
        sysbpf.wait_for_programs()
        if self._numbers:
            self._numbers.stop({stream.name: self.sequence(stream) for stream in STREAMS})

    def ring(self, stream: Stream) -> Ring:
        """Map the ring of a stream."""
        return Ring(self._maps[stream.ring], self._settings.ring_bytes[stream.ring], stream.dtype)

    def counters(self, stream: Stream) -> KernelCounters:
        """Read a stream's counters, summed over the CPUs."""
        passed, ring_full, _ = zip(*self._words(stream), strict=True)
        nested = sum(sysbpf.program_info(program).recursion_misses for program in self._programs[stream.name])
        return KernelCounters(sum(passed), sum(ring_full), nested)

    def sequence(self, stream: Stream) -> list[int]:
        """Read the last number (cpu_seq) of each possible CPU."""
        return [seq for _, _, seq in self._words(stream)]

    def _words(self, stream: Stream) -> Iterator[tuple[int, int, int]]:
        size = self._cpus * _COUNTERS.size
        value = sysbpf.lookup(self._maps["counters"], struct.pack("<I", stream.index), size)
        return _COUNTERS.iter_unpack(value)

    def _seed(self, numbers: Mapping[str, Sequence[int]]) -> None:
        for stream in STREAMS:
            value = b"".join(_COUNTERS.pack(0, 0, number) for number in numbers[stream.name])
            sysbpf.update(self._maps["counters"], struct.pack("<I", stream.index), value)

    def program_infos(self, stream: Stream) -> list[sysbpf.ProgramInfo]:
        """Return the kernel's run statistics of the stream's programs."""
        return [sysbpf.program_info(program) for program in self._programs[stream.name]]

    def put_rules(self, rules: Tables) -> int:
        """Put other rules in force, between two segments, and return their version. The settings' own are version 1."""
        return self._rules.put(rules)

    def exclude_socket(self, descriptor: int) -> None:
        """Leave out what the socket `descriptor` sends, from now on. Call it before the socket connects."""
        own = socket.socket(fileno=os.dup(descriptor))
        with own:
            cookie = own.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        sysbpf.update(self._maps["own_sockets"], cookie, b"\1")

    def exclude_listener(self, address: Address, port: int) -> None:
        """Leave out what connections accepted on this local endpoint send, in the agent's network namespace.

        `address` is the one that peers connect to; the settings must have own_listeners.
        """
        if address.is_unspecified or not self._settings.own_listeners:
            raise ValueError("exclude_listener needs own_listeners in the settings, and an address that is no wildcard")
        namespace = os.stat("/proc/self/ns/net").st_ino
        sysbpf.update(self._maps["own_listeners"], _in6(address) + struct.pack("<II", namespace, port), b"\1")

    def close(self) -> None:
        """Let go of everything: the programs end, unless they are kept."""
        self._end_loader()
        sysbpf.close_all([*self._links, *self._descriptors])
        self._links, self._descriptors = [], []

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_loader(self) -> None:
        if self._loader is not None:
            self._loader.end()
            self._loader = None


class _Loader:
    """The loader's process, and the socket to it."""

    def __init__(self) -> None:
        package = Path(__file__).resolve().parent.parent
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_ANSWER_TIMEOUT_S)
        # This very package and not another that is installed; and of its folder nothing else, since the site-packages
        # of a venv must not shadow those of the system's Python.
        code = f"import sys; sys.path.insert(0, {str(package)!r}); import producer; del sys.path[0]"
        code += f"; from producer.loader import main; main({theirs.fileno()}, {os.getpid()})"
        # Isolated (-I): a program that runs as root takes no modules from the working directory or PYTHONPATH.
        command = [python_with_bcc(), "-I", "-c", code]
        with theirs:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Send a request and return the answer, and the descriptors that come with it."""
        try:
            self._channel.send(json.dumps(request).encode())
            packet, descriptors, *_ = socket.recv_fds(self._channel, PACKET_BYTES, _FDS, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError as error:
            raise errors.HookError(f"the loader has not answered within {_ANSWER_TIMEOUT_S:.0f} s") from error
        except ConnectionError:
            packet = b""
        if not packet:
            raise errors.HookError(f"the loader ended with status {self._child.wait()} and no answer")
        with open(descriptors[0], "rb") as file:
            file.seek(0)
            if log := file.read().decode(errors="replace"):
                logger.debug("loader log:\n%s", log)
        answer = json.loads(packet)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer, descriptors[1:]

    def end(self) -> None:
        """End the process, also in the midst of its work, and with it its copies of the descriptors."""
        self._channel.close()
        self._child.kill()
        self._child.wait()


def _in6(address: Address) -> bytes:
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def python_with_bcc() -> str:
    """Return a Python that can import bcc: ours if it can, else the system's, where the distribution's package is."""
    for python in (sys.executable, "/usr/bin/python3", shutil.which("python3")):
        if python and _has_bcc(python):
            return python
    raise errors.UnavailableError(BCC_MISSING)


# The package called bcc on PyPI is something else, and has no such file.
_FIND_BCC = """
import importlib.util, os.path, sys
found = importlib.util.find_spec("bcc")
sys.exit(not (found and os.path.exists(os.path.join(os.path.dirname(found.origin), "libbcc.py"))))
"""


def _has_bcc(python: str) -> bool:
    return subprocess.run([python, "-I", "-c", _FIND_BCC], stderr=subprocess.DEVNULL, check=False).returncode == 0
