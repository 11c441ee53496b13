"""Paths of cgroups by their id, which is the inode number of the cgroup's folder."""

import os
from pathlib import Path


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
