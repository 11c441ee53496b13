"""Cgroups: the root of their hierarchy, their paths by id (the inode number of their folder), and their owners by path.

Folders can have any name, so paths are escaped (producer.host.text). A lookup is bounded in time for any number of
cgroups: a path that is not found in time is unknown for now, and found later.
"""

import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from producer.host.exhausted import exhausted
from producer.host.text import name

# Docker, containerd, CRI-O and Podman name the cgroup of a container ID or PREFIX-ID.scope.
# containerd names it SLICE:PREFIX:ID if it expects systemd's cgroups and the kubelet does not.
_CONTAINER = re.compile(r"(?:[\w.-]+-|[\w.-]+:[\w.-]+:)?([0-9a-f]{64})(?:\.scope)?")
# The kubelet names a pod's cgroup podUID; with systemd, a slice with "_" for "-". Static pods have a digest as UID.
_POD = re.compile(
    r"(?:[\w.-]*kubepods[\w.-]*-)?pod([0-9a-f]{8}(?:[_-][0-9a-f]{4}){3}[_-][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice(?::.*)?)?"
)
_UNIT = re.compile(r".+\.(?:service|scope|socket|mount|swap)")
_ESCAPE = re.compile(rb"\\([0-7]{3})")

_MAX_CACHED = 16_384
_LOOK_S = 0.005
_ENTRIES_AT_ONCE = 256
_SHARE = 0.05
"""Maximum share of the time spent on lookups."""
_ROOT_ID = 1
"""The kernel's id, and inode number, of the root cgroup."""


def cgroup2_root(mounts: Path = Path("/proc/self/mountinfo")) -> Path | None:
    """Return where the cgroup v2 hierarchy is mounted, or None. Other mounts may have only a part of it.

    The paths of other mounts can be any bytes, since users can mount (FUSE). The kernel escapes only space, tab, line
    feed, backslash and #, so other characters that Python takes for white space do not separate.
    """
    found = []
    for line in mounts.read_bytes().split(b"\n"):
        mount, _, kind = line.partition(b" - ")
        match mount.split(b" "):
            case [_, _, _, part, path, *_] if kind.startswith(b"cgroup2 "):
                found.append((_level(part), path))
    if not found:
        return None
    _, path = min(found, key=itemgetter(0))
    return Path(os.fsdecode(_ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), path)))


ONLY_A_PART = (
    "only the cgroups of this container, so the hook cgroup_skb sees no others: mount the host's /sys/fs/cgroup"
)


def is_part(root: Path) -> bool:
    """Whether a mounted hierarchy is only that of a cgroup namespace, such as a container's, and not the host's."""
    try:
        return root.stat().st_ino != _ROOT_ID
    except OSError:
        return False


def _level(part: bytes) -> int:
    """Return how far the cgroup that a mount shows is below the root of our cgroup namespace; negative: above it."""
    folders = [each for each in part.split(b"/") if each]
    return len(folders) - 2 * folders.count(b"..")


def unit(path: str) -> str | None:
    """Return the systemd unit that a cgroup belongs to: the first folder of its path below the slices.

    Folders below a unit can have any name, since systemd may have delegated them.
    """
    first = next((folder for folder in path.split("/") if folder and not folder.endswith(".slice")), "")
    return first if _UNIT.fullmatch(first) else None


def container(path: str) -> str | None:
    """Return the id of the container that a cgroup belongs to, 64 hexadecimal digits."""
    found = (_CONTAINER.fullmatch(folder) for folder in reversed(path.split("/")))
    return next((match[1] for match in found if match), None)


def pod_uid(path: str) -> str | None:
    """Return the UID of the Kubernetes pod that a cgroup belongs to."""
    if "kubepods" not in path:
        return None
    found = (_POD.fullmatch(folder) for folder in reversed(path.split("/")))
    return next((match[1].replace("_", "-") for match in found if match), None)


class CgroupPaths:
    """Resolves ids below the cgroup v2 root. Caches the last `max_cached` ids, even after their cgroup is deleted.

    Without `root`, no cgroup v2 hierarchy is mounted, and nothing resolves.
    """

    def __init__(
        self,
        root: Path | None,
        clock: Callable[[], float] = time.monotonic,
        max_cached: int = _MAX_CACHED,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._root = root
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._max_cached = max_cached
        self._paths: OrderedDict[int, str | None] = OrderedDict()
        self._pending: dict[int, int] = {}
        """Ids to look up, with the number of walks started before."""
        self._walk: Iterator[None] | None = None
        self._walks = 0
        self._next_lookup_s = 0.0
        self.found = 0
        """Number of ids found so far."""

    def path(self, cgroup_id: int) -> str | None:
        """Return the path below the root, `/` for the root itself; None if it is unknown, or not known yet."""
        if cgroup_id in self._paths:
            self._paths.move_to_end(cgroup_id)
            return self._paths[cgroup_id]
        self.look_up([cgroup_id])
        return self._paths.get(cgroup_id)

    def look_up(self, ids: Iterable[int] = ()) -> None:
        """Look up `ids` and pending ones, for a few milliseconds at most and a bounded share of the time.

        Ask for many at once: one walk finds them all, and the next one has to wait.
        """
        if self._root is None:
            return
        for cgroup_id in ids:
            if cgroup_id not in self._paths and len(self._pending) < self._max_cached:
                self._pending.setdefault(cgroup_id, self._walks)
        now = self._clock()
        if not self._pending or now < self._next_lookup_s:
            return
        used = self._cpu_clock()
        while self._pending and self._clock() - now < _LOOK_S:
            if self._walk is None:
                self._walks += 1
                self._walk = self._folders()
            try:
                is_over = next(self._walk, self) is self
            except OSError:  # no descriptors or memory for now
                self._walk = None
                break
            if is_over:
                self._walk = None
                self._drop_missing()
        self._next_lookup_s = self._clock() + (self._cpu_clock() - used) / _SHARE

    def _folders(self) -> Iterator[None]:
        """Visit all folders and record their paths. OSError if descriptors or memory run out."""
        assert self._root is not None
        root = os.fsencode(self._root)
        try:
            self._record(os.stat(root).st_ino, b"/")
        except OSError:
            return
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for number, entry in enumerate(entries, 1):
                        if entry.is_dir(follow_symlinks=False):
                            self._record(entry.inode(), entry.path[len(root) :])
                            folders.append(entry.path)
                        if number % _ENTRIES_AT_ONCE == 0:
                            yield
            except OSError as error:
                if exhausted(error):
                    raise
                continue  # deleted meanwhile
            yield

    def _record(self, number: int, path: bytes) -> None:
        """Store the path if its id is pending."""
        if self._pending.pop(number, None) is not None:
            self._store(number, name(path))
            self.found += 1

    def _drop_missing(self) -> None:
        """Mark ids as unknown that a full walk, started after their request, did not find."""
        for number in [number for number, walks in self._pending.items() if walks < self._walks]:
            del self._pending[number]
            self._store(number, None)

    def _store(self, number: int, path: str | None) -> None:
        self._paths[number] = path
        if len(self._paths) > self._max_cached:
            self._paths.popitem(last=False)
