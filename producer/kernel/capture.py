"""The kernel side for the agent: hooks in use, rings, maps and counters; attach and detach.

A child process (loader_child) loads and attaches; this module holds the descriptors that it passes. Unless they are
pinned (pinned) or held by systemd (fdstore), the kernel removes the programs with the last descriptor, even after
kill -9.
"""

import hashlib
import json
import logging
import os
import secrets
import struct
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

from producer import __version__
from producer.errors import UnavailableError
from producer.events import FLOWS, STREAMS, Stream, layout_check
from producer.host.cgroups import ONLY_A_PART, cgroup2_root, is_part
from producer.host.progress import Progress
from producer.host.sockets import Address, cookie, listener_at
from producer.kernel import bpf_syscall, hooks, switches
from producer.kernel.handover import HandoverStore
from producer.kernel.loader import Loader
from producer.kernel.loader_child import ATTACH, MAPS
from producer.kernel.manifest import COUNTERS, Manifest, StoredRing, with_readable_rings
from producer.kernel.ringbuf import Ring
from producer.kernel.rule_maps import RuleMaps, active_rules, set_active_rules
from producer.kernel.sequence import EventNumbers, Numbers
from producer.kernel.settings import CaptureSettings
from producer.paths import BPF
from producer.rules.tables import mapped

logger = logging.getLogger(__name__)

FLOWS_PER_STEP = 1024
_OWN_OPENED = b"\1"
"""OWN_OPENED in bpf/maps.h."""


@dataclass(frozen=True, slots=True)
class KernelCounters:
    """Events of one stream since the programs were loaded.

    `nested` counts runs that the kernel skipped because the program would have interrupted itself, and returns of calls
    whose entry was skipped or evicted. It is counted before the filter. Closing records are taken by two programs: the
    smaller of their counts is included. `unseen` counts retransmissions that the hook raw_tp has missed, by the records
    of their connections.
    """

    passed: int
    ring_full: int
    nested: int
    unseen: int


class Capture:
    """The loaded programs of the streams; `attach` starts them. As a context manager, detaches on exit.

    With a store, probes left by an earlier process are taken over if they are the same that would be loaded. Otherwise
    they stay attached until the new ones are. Without `numbers`, event numbers begin at 1.
    """

    def __init__(
        self, settings: CaptureSettings, store: HandoverStore | None = None, numbers: EventNumbers | None = None
    ) -> None:
        self._settings = settings
        self._store = store
        self._numbers = numbers
        self.taken_over = False
        """Whether an earlier process attached the programs, and they have been attached since."""
        self.cached = False
        """Whether the programs came from the program cache."""
        self.programs_from = ""
        """The file that the programs came from, made by `rebpf compile`."""
        self.ring_id = ""
        """Identifies the rings: new at each load, unchanged when they are taken over."""
        self.old_ring_id: str | None = None
        """The `ring_id` of the newest old rings, while there are any."""
        self._old_rings: dict[str, tuple[StoredRing, int]] = {}
        self._cgroups = cgroup2_root()
        self._replacing = False
        self._descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        self._own_sockets: list[int] = []
        self._programs: dict[str, list[int]] = {}
        self._links: list[int] = []
        self._iterators: list[int] = []
        """Indexes of the links through which flows are read."""
        self._last_missed: dict[int, int] = {}
        self._loader: Loader | None = None
        self._cpus = bpf_syscall.possible_cpus()
        self.hooks_in_use: dict[str, str] = {}
        """By stream."""
        self.refusals: list[hooks.Refusal] = []
        """The better hooks, and why the host does not allow them."""

    def load(self) -> None:
        """Load the programs, or take over the stored ones if they are the same.

        Raises HookError, PermissionDenied or UnavailableError with the reason in one line.
        """
        self._fingerprint = _fingerprint(self._settings)  # before they are compiled: an upgrade may replace the files
        if not self._open_stored():
            with Progress("compiling and loading the BPF programs"):
                self._load()
        self._own_sockets.append(self._maps["own_sockets"])
        self.rules = RuleMaps(self._maps)
        self.rules.put(self._settings.rules)

    def _open_stored(self) -> bool:
        """Take over the stored probes, or at least their rings to drain them; return whether nothing must be loaded."""
        manifest = self._store.manifest() if self._store else None
        if self._store is None or manifest is None:
            return False
        opened: dict[str, int] = {}
        try:
            stored = Manifest.from_json(manifest)
            opened = dict(zip(stored.objects, self._store.open(stored.objects), strict=True))
            stored = with_readable_rings(stored, opened)
        except (OSError, LookupError, ValueError) as error:
            bpf_syscall.close_all(opened.values())
            logger.warning("hooks of the last run cannot be taken over, the events in their rings are lost: %s", error)
            self._replacing = True
            return False
        # Without rules, a stop was about to detach them, and sockets have decisions of versions that would come again.
        if stored.fingerprint == self._fingerprint and active_rules(opened[stored.maps["rules_active"]]):
            self._take_over(stored, opened)
        else:
            self._replace(stored, opened)
        return self.taken_over

    def _take_over(self, stored: Manifest, opened: Mapping[str, int]) -> None:
        self.taken_over = True
        self.ring_id, self.old_ring_id = stored.ring_id, stored.old_ring_id
        self.hooks_in_use, self.refusals = dict(stored.hooks), list(stored.refusals)
        self._maps = {name: opened[stored_as] for name, stored_as in stored.maps.items()}
        self._programs = {stream: [opened[each] for each in programs] for stream, programs in stored.programs.items()}
        self._links = [opened[link] for link in stored.links]
        self._iterators = [*map(stored.links.index, stored.iterators)]
        self._old_rings = {ring.name: (ring, opened[ring.name]) for ring in stored.old_rings}
        apart = {*stored.links, *self._old_rings}
        self._descriptors = [descriptor for name, descriptor in opened.items() if name not in apart]

    def _replace(self, stored: Manifest, opened: dict[str, int]) -> None:
        logger.info(
            "hooks of the last run do not match the configuration or version: detaching them once new ones are attached"
        )
        self._replacing = True
        self.old_ring_id = stored.ring_id
        self._old_rings = {ring.name: (ring, opened.pop(ring.name)) for ring in [*stored.old_rings, *stored.rings]}
        # Until they are detached they capture the agent's own traffic too, so exclude it there as well.
        self._own_sockets = [opened.pop(stored.maps["own_sockets"])]
        self._descriptors = [*self._own_sockets]
        bpf_syscall.close_all(opened.values())

    def _load(self) -> None:
        settings = self._settings
        self._loader = Loader()
        answer, descriptors = self._loader.ask(
            {
                "do": "load",
                "version": __version__,
                "programs": str(settings.programs or ""),
                "btf": str(settings.btf or ""),
                "bpf": str(BPF),
                "hooks": settings.hooks,
                "streams": [stream.name for stream in settings.streams],
                "ring_bytes": dict(settings.ring_bytes),
                "layout_check": layout_check(),
                "keeps": self._store is not None,
                "cache": settings.cache and str(settings.cache),
            }
        )
        self._descriptors += descriptors
        self.cached, self.programs_from = answer["cached"], answer["programs_from"]
        for warning in answer["warnings"]:
            logger.warning("%s", warning)
        self.ring_id = secrets.token_hex(8)
        self.hooks_in_use = answer["hooks"]
        self.refusals = [hooks.Refusal(*each) for each in answer["refusals"]]
        count = len(answer["maps"])
        self._maps = dict(zip(answer["maps"], descriptors[:count], strict=True))
        for stream, program in zip(answer["programs"], descriptors[count:], strict=True):
            self._programs.setdefault(stream, []).append(program)

    def _save(self) -> None:
        """Store these probes and the old rings, and release everything else."""
        assert self._store is not None
        maps = {name: f"{name}_{self.ring_id}" for name in self._maps}
        programs = {
            stream: {f"{stream}_{i}_{self.ring_id}": program for i, program in enumerate(programs)}
            for stream, programs in self._programs.items()
        }
        links = {f"link_{i}_{self.ring_id}": link for i, link in enumerate(self._links)}
        stored = Manifest(
            fingerprint=self._fingerprint,
            ring_id=self.ring_id,
            hooks=self.hooks_in_use,
            refusals=self.refusals,
            maps=maps,
            programs={stream: list(named) for stream, named in programs.items()},
            links=list(links),
            iterators=[list(links)[index] for index in self._iterators],
            rings=[
                StoredRing(each, maps[each.ring], self._settings.ring_bytes[each.ring])
                for each in self._settings.streams
            ],
            old_ring_id=self.old_ring_id,
            old_rings=[ring for ring, _ in self._old_rings.values()],
        )
        objects = {stored_as: self._maps[name] for name, stored_as in maps.items()}
        objects.update(link for named in programs.values() for link in named.items())
        objects.update(links)
        objects.update({name: descriptor for name, (_, descriptor) in self._old_rings.items()})
        self._store.save(objects, stored.to_json())

    def attach(self) -> None:
        """Attach all programs, unless they were taken over. Events arrive from here on.

        Only then are stored probes that do not match detached. For a moment both capture each segment; the events of
        the old ones are in the old rings.
        """
        if self.taken_over:
            if self._numbers:
                self._numbers.resume()
            return
        if self._loader is None:
            raise ValueError("attach must be called once, after load")
        zeros = dict.fromkeys((stream.name for stream in STREAMS), [0] * self._cpus)
        self._seed(self._numbers.start(overlap=self._replacing) if self._numbers else zeros)
        answer, self._links = self._loader.ask(ATTACH)
        self._iterators = answer["iterators"]
        self._end_loader()
        if self._store:
            self._save()
        if self._replacing:
            self._own_sockets = [self._maps["own_sockets"]]
            bpf_syscall.wait_for_programs()

    def detach(self) -> None:
        """Detach and clear the store. No event arrives after this; rings and counters stay readable."""
        if not self._links:
            return
        # The kernel may release a link a moment after its last descriptor; without rules, a late run captures nothing.
        set_active_rules(self._maps["rules_active"], 0)
        if self._store:
            self._store.clear()
        self._kprobes_missed()
        bpf_syscall.close_all(self._links)
        self._links, self._iterators = [], []
        bpf_syscall.wait_for_programs()
        if self._numbers:
            self._numbers.stop({stream.name: self.sequence(stream) for stream in STREAMS})

    def check(self) -> None:
        """Raise UnavailableError if a probe was detached, unpinned or turned off, or sees a part of the host only."""
        if any(map(bpf_syscall.is_detached, self._links)):
            raise UnavailableError("another process has detached a program, so events are missing: restart")
        switches.check(self.hooks_in_use.values() if self._links else ())
        if self._store and self._links:
            self._store.check()
        if self._links and "cgroup_skb" in self.hooks_in_use.values() and self._cgroups and is_part(self._cgroups):
            raise UnavailableError(f"{self._cgroups} has {ONLY_A_PART}, and restart")

    def report_flows(self) -> None:
        """Write a record of each open connection to the ring of flows, from `attach` to `detach`."""
        for _ in self.report_some_flows():
            pass

    def report_some_flows(self) -> Generator[None]:
        """Write a record of each open connection to the ring of flows, in steps of up to 1,024 records.

        Connections that open or close between two steps may shift the order, so that one is reported twice, or not.
        """
        for index in self._iterators:
            yield from bpf_syscall.run_iterator(self._links[index], FLOWS_PER_STEP)

    def ring_descriptor(self, stream: Stream) -> int:
        """Return the descriptor of a stream's ring, for epoll; it stays open until `close`."""
        return self._maps[stream.ring]

    def ring(self, stream: Stream) -> Ring:
        """Map the ring of a stream."""
        return Ring(self._maps[stream.ring], self._settings.ring_bytes[stream.ring], stream.dtype)

    def old_rings(self) -> list[tuple[Stream, Ring]]:
        """Map the rings of replaced probes, oldest first. Each stream has the dtype of its ring's rows.

        Commits persist across processes. The rings are stored until `drop_old_rings`.
        """
        return [
            (ring.stream, Ring(descriptor, ring.size_bytes, ring.stream.dtype))
            for ring, descriptor in self._old_rings.values()
        ]

    @property
    def old_streams(self) -> set[Stream]:
        """Streams that have old rings."""
        return {ring.stream for ring, _ in self._old_rings.values()}

    def drop_old_rings(self) -> None:
        """Release the old rings, after `attach`. Mapped ones stay readable."""
        if not self._old_rings:
            return
        descriptors = [descriptor for _, descriptor in self._old_rings.values()]
        self._old_rings, self.old_ring_id = {}, None
        if self._store and self._links:
            self._save()
        bpf_syscall.close_all(descriptors)

    def counters(self, stream: Stream) -> KernelCounters:
        """Read a stream's counters, summed over the CPUs."""
        begin, ring_full, seq, forgotten, _ = (sum(column) for column in zip(*self._words(stream), strict=True))
        recursions = map(bpf_syscall.recursion_misses, self._programs.get(stream.name, ()))
        kprobes_missed = self._kprobes_missed()
        misses = [count + kprobes_missed.get(program_id, 0) for program_id, count in recursions]
        nested = min(misses[: hooks.CLOSING_PROGRAMS], default=0) if stream == FLOWS else sum(misses)
        unseen = forgotten if self.hooks_in_use.get(stream.name) == "raw_tp" else 0
        return KernelCounters(seq - begin, ring_full, nested + forgotten - unseen, unseen)

    def _kprobes_missed(self) -> Mapping[int, int]:
        """Return how many runs kprobes have missed, by their program's id; after `detach`, until then."""
        if self._links and "kprobe" in self.hooks_in_use.values():
            self._last_missed = dict(map(bpf_syscall.kprobe_misses, self._links))
        return self._last_missed

    def sequence(self, stream: Stream) -> list[int]:
        """Read the last number (cpu_seq) of each possible CPU."""
        return [seq for _, _, seq, *_ in self._words(stream)]

    def _words(self, stream: Stream) -> Iterator[tuple[int, ...]]:
        size = self._cpus * COUNTERS.size
        value = bpf_syscall.lookup(self._maps["counters"], struct.pack("<I", stream.index), size)
        return COUNTERS.iter_unpack(value)

    def _seed(self, numbers: Numbers) -> None:
        for stream in STREAMS:  # also those not captured, whose numbers continue when they are
            mask = self._settings.wakeup_mask(stream)
            value = b"".join(COUNTERS.pack(number, 0, number, 0, mask) for number in numbers[stream.name])
            bpf_syscall.update(self._maps["counters"], struct.pack("<I", stream.index), value)

    def limit_transmits(self, rate: int, turn: int) -> None:
        """Capture the transmits of one in `rate` connections, a power of two; in each turn, of others."""
        bpf_syscall.update(self._maps["transmit_budget"], struct.pack("<I", 0), struct.pack("<II", rate, turn))

    def exclude_socket(self, descriptor: int) -> None:
        """Exclude the traffic of this process's socket `descriptor`, and of its peer if in the same network namespace.

        Call it after `attach` and before the socket connects: the programs learn the peer from the first segment.
        """
        for own_sockets in self._own_sockets:
            bpf_syscall.update(own_sockets, cookie(descriptor), _OWN_OPENED)

    def exclude_listener(self, address: Address, port: int) -> None:
        """Exclude the traffic of this process's listening socket, and of the sockets that it accepts from now on.

        LookupError if this process does not listen there. ValueError for a wildcard, because accepted sockets have
        specific addresses.
        """
        if address.is_unspecified:
            raise ValueError(f"exclude_listener: expected the address that peers connect to, not {address}")
        listener = cookie(listener_at(address, port))
        namespace = os.stat("/proc/self/ns/net").st_ino
        bpf_syscall.update(self._maps["own_sockets"], listener, _OWN_OPENED)
        bpf_syscall.update(self._maps["own_listeners"], mapped(address) + struct.pack("<II", namespace, port), b"\1")

    def close(self) -> None:
        """Release everything. The kernel removes the programs, unless they are stored."""
        self._end_loader()
        old_rings = [descriptor for _, descriptor in self._old_rings.values()]
        bpf_syscall.close_all([*self._links, *self._descriptors, *old_rings])
        self._links, self._descriptors, self._old_rings = [], [], {}

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_loader(self) -> None:
        if self._loader is not None:
            self._loader.end()
            self._loader = None


def _fingerprint(settings: CaptureSettings) -> str:
    """Return a digest of everything that defines programs and maps, except the rules, which can change later."""
    streams = [stream.name for stream in settings.streams]
    probes = repr([hooks.HOOKS_BY_STREAM, hooks.OWN_SOCKETS, hooks.OLD_SOCKETS])
    made_of = [settings.hooks, streams, dict(settings.ring_bytes), str(settings.btf), layout_check(), MAPS, probes]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for path in sorted(BPF.rglob("*.[ch]")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
