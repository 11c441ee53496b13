"""The kernel side as the agent sees it: which rungs are in use, the rings and maps, the counters, attach and detach.

A child process (loader_child) loads and attaches; this module holds the descriptors that it passes. Unless they are
pinned (pinned) or held by systemd (fdstore), the programs end with the last descriptor, also by kill -9.
"""

import hashlib
import json
import logging
import mmap
import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from producer import errors
from producer.events import HOOKS, STREAMS, Stream, layout_check
from producer.host.sockets import Address, cookie, listener_at
from producer.kernel import bpf_syscall
from producer.kernel.hooks import Refusal
from producer.kernel.loader import Loader
from producer.kernel.loader_child import ATTACH
from producer.kernel.manifest import COUNTERS, Kept, KeptRing, usable
from producer.kernel.ringbuf import Ring
from producer.kernel.rule_maps import RuleMaps
from producer.paths import BPF
from producer.rules.tables import Action, Tables, tables

logger = logging.getLogger(__name__)

_OWN_OPENED = b"\1"
"""OWN_OPENED in bpf/maps.h."""


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
    btf: Path | None = None
    compiled: Path | None = None
    """The folder of what was compiled, for the next start; None: each compiles."""

    def __post_init__(self) -> None:
        if unknown := set(self.hooks) - set(HOOKS):
            raise errors.ConfigError(f"unknown hook {min(unknown)!r}: the hooks are {', '.join(HOOKS)}")
        for ring, size in self.ring_bytes.items():
            if size & (size - 1) or not mmap.PAGESIZE <= size <= 1 << 30:
                raise errors.ConfigError(f"{ring}: {size} bytes is no power of two from a page to 1 GiB")


@dataclass(frozen=True, slots=True)
class KernelCounters:
    """Events of one stream since the programs were loaded.

    `nested` counts runs that the kernel skipped because the program would have interrupted itself, and returns of calls
    whose entry was skipped or evicted; it stands before the filter.
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


class Keeper(Protocol):
    """What keeps maps, programs and links by name when the process ends. A name stands for one object for ever."""

    @property
    def outlives_stop(self) -> bool:
        """Whether a stop is no reason to detach: where nobody is to take over, the keeper itself lets go."""

    def manifest(self) -> Mapping[str, Any] | None:
        """Return what `keep` was told; None where nothing is kept, nothing in it where that cannot be read."""

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of kept objects; OSError or LookupError where one is not there."""

    def keep(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Keep the objects of these descriptors by their names, and let go of others that were kept."""

    def clear(self) -> None:
        """Keep nothing."""


class Hooks:
    """The loaded programs of both streams; `attach` starts them. A context manager: leaving it detaches.

    With a keeper, hooks that outlived another process are taken over if they are what would be loaded; if not, they
    stay attached until these are. Without `numbers`, the events' begin at 1.
    """

    def __init__(self, settings: HookSettings, keeper: Keeper | None = None, numbers: Numbers | None = None) -> None:
        self._settings = settings
        self._keeper = keeper
        self._numbers = numbers
        self.taken_over = False
        """Whether the programs were attached by another process, and have been all the time since."""
        self.cached = False
        """Whether what was loaded had been compiled by an earlier start."""
        self.ring_id = ""
        """Which rings these are: another one at each load, the same when they are taken over."""
        self.old_ring_id: str | None = None
        """The `ring_id` that the last of the old rings had, while there are any."""
        self._old_rings: dict[str, tuple[KeptRing, int]] = {}
        self._beside_others = False
        self._descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        self._own_sockets: list[int] = []
        self._programs: dict[str, list[int]] = {}
        self._links: list[int] = []
        self._loader: Loader | None = None
        self._cpus = bpf_syscall.possible_cpus()
        self.rungs: dict[str, str] = {}
        """The rung in use, by stream."""
        self.refusals: list[Refusal] = []
        """The better rungs, and why the host does not allow them."""

    def load(self) -> None:
        """Load, or take over what is kept, if that is the same that would be loaded.

        Raises HookError, PermissionDenied or UnavailableError with the reason in one line.
        """
        if not self._find_kept():
            self._load()
        self._own_sockets.append(self._maps["own_sockets"])
        self._rules = RuleMaps(self._maps)
        self._rules.put(self._settings.rules)

    def _find_kept(self) -> bool:
        """Take over what is kept, or the rings of it that are to be drained; return whether nothing is to be loaded."""
        manifest = self._keeper.manifest() if self._keeper else None
        if self._keeper is None or manifest is None:
            return False
        opened: dict[str, int] = {}
        try:
            kept = Kept.read(manifest)
            opened = dict(zip(kept.objects, self._keeper.open(kept.objects), strict=True))
            kept = usable(kept, opened)
        except (OSError, LookupError, ValueError) as error:
            bpf_syscall.close_all(list(opened.values()))
            logger.warning("hooks that were kept are given up, and the events in their rings are lost: %s", error)
            self._beside_others = True
            return False
        if kept.fingerprint == self._fingerprint():
            self._take_over(kept, opened)
        else:
            self._stand_beside(kept, opened)
        return self.taken_over

    def _take_over(self, kept: Kept, opened: Mapping[str, int]) -> None:
        self.taken_over = True
        self.ring_id, self.old_ring_id = kept.ring_id, kept.old_ring_id
        self.rungs, self.refusals = dict(kept.rungs), list(kept.refusals)
        self._maps = {name: opened[kept_as] for name, kept_as in kept.maps.items()}
        self._programs = {stream: [opened[each] for each in programs] for stream, programs in kept.programs.items()}
        self._links = [opened[link] for link in kept.links]
        self._old_rings = {ring.name: (ring, opened[ring.name]) for ring in kept.old_rings}
        apart = {*kept.links, *self._old_rings}
        self._descriptors = [descriptor for name, descriptor in opened.items() if name not in apart]

    def _stand_beside(self, kept: Kept, opened: dict[str, int]) -> None:
        logger.info("hooks that were kept are not those that are wanted: they stay until these are attached")
        self._beside_others = True
        self.old_ring_id = kept.ring_id
        self._old_rings = {ring.name: (ring, opened.pop(ring.name)) for ring in [*kept.old_rings, *kept.rings]}
        # Until they end, they take what the agent sends: it is to leave itself out there too.
        self._own_sockets = [opened.pop(kept.maps["own_sockets"])]
        self._descriptors = [*self._own_sockets]
        bpf_syscall.close_all(list(opened.values()))

    def _load(self) -> None:
        settings = self._settings
        self._loader = Loader()
        answer, descriptors = self._loader.ask(
            {
                "btf": str(settings.btf or ""),
                "bpf": str(BPF),
                "hooks": settings.hooks,
                "ring_bytes": dict(settings.ring_bytes),
                "layout_check": layout_check(),
                "compiled": settings.compiled and str(settings.compiled),
            }
        )
        self._descriptors += descriptors
        self.cached = answer["cached"]
        for warning in answer["warnings"]:
            logger.warning("%s", warning)
        self.ring_id = secrets.token_hex(8)
        self.rungs = answer["rungs"]
        self.refusals = [Refusal(*each) for each in answer["refusals"]]
        count = len(answer["maps"])
        self._maps = dict(zip(answer["maps"], descriptors[:count], strict=True))
        for stream, program in zip(answer["programs"], descriptors[count:], strict=True):
            self._programs.setdefault(stream, []).append(program)

    def _keep(self) -> None:
        """Keep these hooks and the old rings, and nothing else: others end."""
        assert self._keeper is not None
        maps = {name: f"{name}_{self.ring_id}" for name in self._maps}
        programs = {
            stream: {f"{stream}_{i}_{self.ring_id}": program for i, program in enumerate(programs)}
            for stream, programs in self._programs.items()
        }
        links = {f"link_{i}_{self.ring_id}": link for i, link in enumerate(self._links)}
        kept = Kept(
            fingerprint=self._fingerprint(),
            ring_id=self.ring_id,
            rungs=self.rungs,
            refusals=self.refusals,
            maps=maps,
            programs={stream: list(named) for stream, named in programs.items()},
            links=list(links),
            rings=[KeptRing(each, maps[each.ring], self._settings.ring_bytes[each.ring]) for each in STREAMS],
            old_ring_id=self.old_ring_id,
            old_rings=[ring for ring, _ in self._old_rings.values()],
        )
        objects = {kept_as: self._maps[name] for name, kept_as in maps.items()}
        objects.update(link for named in programs.values() for link in named.items())
        objects.update(links)
        objects.update({name: descriptor for name, (_, descriptor) in self._old_rings.items()})
        self._keeper.keep(objects, kept.manifest())

    def _fingerprint(self) -> str:
        """Return a digest of all that the programs and maps are made of, but for the rules, which can be changed."""
        settings = self._settings
        made_of = [settings.hooks, dict(settings.ring_bytes), str(settings.btf), layout_check()]
        digest = hashlib.sha256(json.dumps(made_of).encode())
        for path in sorted(BPF.rglob("*.[ch]")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def attach(self) -> None:
        """Attach all programs; from here on events come. What was taken over is attached already.

        Other hooks that were kept end only then, and for a moment both take each segment: their events are in the old
        rings.
        """
        if self.taken_over:
            if self._numbers:
                self._numbers.in_use()
            return
        if self._loader is None:
            raise ValueError("attach comes once, after load")
        if self._numbers:
            self._seed(self._numbers.start(overlap=self._beside_others))
        _, self._links = self._loader.ask(ATTACH)
        self._end_loader()
        if self._keeper:
            self._keep()
        if self._beside_others:
            self._own_sockets = [self._maps["own_sockets"]]
            bpf_syscall.wait_for_programs()

    def detach(self) -> None:
        """Detach, and keep nothing: no event comes after this. The rings and counters stay readable."""
        if not self._links:
            return
        # The kernel may end a link a moment after its last descriptor; a program that runs until then takes nothing.
        bpf_syscall.update(self._maps["rules_active"], struct.pack("<I", 0), struct.pack("<Q", 0))
        if self._keeper:
            self._keeper.clear()
        bpf_syscall.close_all(self._links)
        self._links = []
        bpf_syscall.wait_for_programs()
        if self._numbers:
            self._numbers.stop({stream.name: self.sequence(stream) for stream in STREAMS})

    def ring(self, stream: Stream) -> Ring:
        """Map the ring of a stream."""
        return Ring(self._maps[stream.ring], self._settings.ring_bytes[stream.ring], stream.dtype)

    def old_rings(self) -> list[tuple[Stream, Ring]]:
        """Map the rings of hooks that these have replaced, oldest first; each stream has the dtype of its ring's rows.

        What is committed in them stays so when another process comes to it. They are kept until `drop_old_rings`.
        """
        return [
            (ring.stream, Ring(descriptor, ring.size_bytes, ring.stream.dtype))
            for ring, descriptor in self._old_rings.values()
        ]

    def drop_old_rings(self) -> None:
        """Let go of the old rings, after `attach`; what is mapped of them stays readable."""
        if not self._old_rings:
            return
        descriptors = [descriptor for _, descriptor in self._old_rings.values()]
        self._old_rings, self.old_ring_id = {}, None
        if self._keeper and self._links:
            self._keep()
        bpf_syscall.close_all(descriptors)

    def counters(self, stream: Stream) -> KernelCounters:
        """Read a stream's counters, summed over the CPUs."""
        passed, ring_full, _, forgotten = (sum(column) for column in zip(*self._words(stream), strict=True))
        nested = sum(bpf_syscall.program_info(program).recursion_misses for program in self._programs[stream.name])
        return KernelCounters(passed, ring_full, nested + forgotten)

    def sequence(self, stream: Stream) -> list[int]:
        """Read the last number (cpu_seq) of each possible CPU."""
        return [seq for _, _, seq, _ in self._words(stream)]

    def _words(self, stream: Stream) -> Iterator[tuple[int, int, int, int]]:
        size = self._cpus * COUNTERS.size
        value = bpf_syscall.lookup(self._maps["counters"], struct.pack("<I", stream.index), size)
        return COUNTERS.iter_unpack(value)

    def _seed(self, numbers: Mapping[str, Sequence[int]]) -> None:
        for stream in STREAMS:
            value = b"".join(COUNTERS.pack(0, 0, number, 0) for number in numbers[stream.name])
            bpf_syscall.update(self._maps["counters"], struct.pack("<I", stream.index), value)

    def program_infos(self, stream: Stream) -> list[bpf_syscall.ProgramInfo]:
        """Return the kernel's run statistics of the stream's programs."""
        return [bpf_syscall.program_info(program) for program in self._programs[stream.name]]

    def put_rules(self, rules: Tables) -> int:
        """Put other rules in force, between two segments, and return their version. The settings' own are version 1."""
        return self._rules.put(rules)

    def exclude_socket(self, descriptor: int) -> None:
        """Leave out what this process's socket `descriptor` sends, and what its peer does in this network namespace.

        Call it after `attach` and before the socket connects: the peer is known from the first segment to it on that
        the programs see.
        """
        for own_sockets in self._own_sockets:
            bpf_syscall.update(own_sockets, cookie(descriptor), _OWN_OPENED)

    def exclude_listener(self, address: Address, port: int) -> None:
        """Leave out what this process's socket that listens there sends, and the sockets that it accepts from now on.

        LookupError if this process does not listen there, ValueError for a wildcard: what is accepted has addresses.
        """
        if address.is_unspecified:
            raise ValueError(f"exclude_listener needs the address that peers connect to, not {address}")
        listener = cookie(listener_at(address, port))
        namespace = os.stat("/proc/self/ns/net").st_ino
        bpf_syscall.update(self._maps["own_sockets"], listener, _OWN_OPENED)
        bpf_syscall.update(self._maps["own_listeners"], _in6(address) + struct.pack("<II", namespace, port), b"\1")

    def close(self) -> None:
        """Let go of everything: the programs end, unless they are kept."""
        self._end_loader()
        old_rings = [descriptor for _, descriptor in self._old_rings.values()]
        bpf_syscall.close_all([*self._links, *self._descriptors, *old_rings])
        self._links, self._descriptors, self._old_rings = [], [], {}

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


def _in6(address: Address) -> bytes:
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
