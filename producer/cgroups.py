"""Cgroups: their paths by id, which is the inode number of the cgroup's folder, and whose they are by their path."""

import os
import re
from pathlib import Path

# Docker, containerd, CRI-O and Podman name a container's cgroup by its id, bare or as PREFIX-ID.scope.
_CONTAINER = re.compile(r"(?:[\w.-]+-)?([0-9a-f]{64})(?:\.scope)?")
_UNIT = re.compile(r".+\.(?:service|scope|socket|mount|swap)")


def unit(path: str) -> str | None:
    """Return the systemd unit that a cgroup belongs to: the innermost service, scope, ... in its path."""
    return next((name for name in reversed(path.split("/")) if _UNIT.fullmatch(name)), None)


def container(path: str) -> str | None:
    """Return the id of the container that a cgroup belongs to, 64 hexadecimal digits."""
    found = (_CONTAINER.fullmatch(name) for name in reversed(path.split("/")))
    return next((match[1] for match in found if match), None)


class CgroupPaths:
    """Resolves ids below the cgroup v2 root; an id that was seen once keeps its path after the cgroup is gone.

    `root` None: no cgroup v2 hierarchy is mounted, and nothing resolves.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._paths: dict[int, str | None] = {}

    def path(self, cgroup_id: int) -> str | None:
        """Return the path below the root, `/` for the root itself; None where no such folder was found."""
        if cgroup_id not in self._paths and self._root is not None:
            self._paths[cgroup_id] = None
            self._walk(self._root)
        return self._paths.get(cgroup_id)

    def _walk(self, root: Path) -> None:
        for folder, _, _ in os.walk(root):
            try:
                inode = os.stat(folder).st_ino
            except FileNotFoundError:
                continue
            self._paths[inode] = folder.removeprefix(str(root)) or "/"
