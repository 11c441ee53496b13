"""Cgroups: their paths by id, which is the inode number of the cgroup's folder, and whose they are by their path.

Folders may have any name: paths are escaped (producer.host.text). A look-up has a bound in time, however many cgroups
there are: what it does not find in time is unknown for now, and found later.
"""

import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from producer.host.text import name

# Docker, containerd, CRI-O and Podman name a container's cgroup by its id, bare or as PREFIX-ID.scope.
_CONTAINER = re.compile(r"(?:[\w.-]+-)?([0-9a-f]{64})(?:\.scope)?")
_UNIT = re.compile(r".+\.(?:service|scope|socket|mount|swap)")

_MAX_KNOWN = 16_384
_LOOK_S = 0.005
_ENTRIES_AT_ONCE = 256
_SHARE = 0.05
"""Most of the time that is spent on looking for paths."""


def unit(path: str) -> str | None:
    """Return the systemd unit that a cgroup belongs to: the first folder of its path below the slices.

    What is below a unit belongs to whom systemd has delegated it to, who may name folders as he likes.
    """
    first = next((folder for folder in path.split("/") if folder and not folder.endswith(".slice")), "")
    return first if _UNIT.fullmatch(first) else None


def container(path: str) -> str | None:
    """Return the id of the container that a cgroup belongs to, 64 hexadecimal digits."""
    found = (_CONTAINER.fullmatch(folder) for folder in reversed(path.split("/")))
    return next((match[1] for match in found if match), None)


class CgroupPaths:
    """Resolves ids below the cgroup v2 root. The last `max_known` ids keep their paths, also after the cgroup is gone.

    `root` None: no cgroup v2 hierarchy is mounted, and nothing resolves.
    """

    def __init__(
        self, root: Path | None, clock: Callable[[], float] = time.monotonic, max_known: int = _MAX_KNOWN
    ) -> None:
        self._root = root
        self._clock = clock
        self._max_known = max_known
        self._known: OrderedDict[int, str | None] = OrderedDict()
        self._wanted: dict[int, int] = {}
        """Ids that are looked for, and how many walks had begun before."""
        self._walk: Iterator[None] | None = None
        self._walks = 0
        self._may_look_at = 0.0
        self.found = 0
        """How many ids have been found so far."""

    def path(self, cgroup_id: int) -> str | None:
        """Return the path below the root, `/` for the root itself; None where it is not known, or not known yet."""
        if cgroup_id in self._known:
            self._known.move_to_end(cgroup_id)
            return self._known[cgroup_id]
        if self._root is None:
            return None
        if len(self._wanted) < self._max_known:
            self._wanted.setdefault(cgroup_id, self._walks)
        self.look()
        return self._known.get(cgroup_id)

    def look(self) -> None:
        """Look for what is wanted, for a few milliseconds at most, and seldom enough."""
        now = self._clock()
        if not self._wanted or now < self._may_look_at:
            return
        while self._wanted and self._clock() - now < _LOOK_S:
            if self._walk is None:
                self._walks += 1
                self._walk = self._folders()
            if next(self._walk, self) is self:
                self._walk = None
                self._give_up()
        end = self._clock()
        self._may_look_at = end + (end - now) / _SHARE

    def _folders(self) -> Iterator[None]:
        """Visit all folders, and note each one's path."""
        assert self._root is not None
        root = os.fsencode(self._root)
        try:
            self._note(os.stat(root).st_ino, b"/")
        except OSError:
            return
        left = [root]
        while left:
            folder = left.pop()
            try:
                with os.scandir(folder) as entries:
                    for number, entry in enumerate(entries, 1):
                        if entry.is_dir(follow_symlinks=False):
                            self._note(entry.inode(), entry.path[len(root) :])
                            left.append(entry.path)
                        if number % _ENTRIES_AT_ONCE == 0:
                            yield
            except OSError:  # it is gone
                continue
            yield

    def _note(self, number: int, path: bytes) -> None:
        """Keep the path of an id that is wanted; others are not escaped before somebody asks."""
        if self._wanted.pop(number, None) is not None:
            self._keep(number, name(path))
            self.found += 1

    def _give_up(self) -> None:
        """Note those that a whole walk, begun after they were wanted, has not found: they are gone."""
        for number in [number for number, walks in self._wanted.items() if walks < self._walks]:
            del self._wanted[number]
            self._keep(number, None)

    def _keep(self, number: int, path: str | None) -> None:
        self._known[number] = path
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)
