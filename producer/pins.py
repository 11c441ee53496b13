"""Maps, programs and links that outlive the process that made them, in a folder of a bpffs.

Each object is a file there. What they are is a manifest, kept as the target of the symbolic link `manifest` (a bpffs
holds no other text), made last and removed first: without it, the files are the remains of a start or stop that did not
come to its end. All of it is gone at a reboot. The folder is locked (flock) by the process that uses it.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from producer import sysbpf
from producer.errors import BusyError, ConfigError


class PinFolder:
    """The folder at `path`, made if need be (mode 0700), and locked while this object is entered.

    Entering raises ConfigError where there is no bpffs, BusyError where another process holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifest = path / "manifest"

    def manifest(self) -> dict[str, Any] | None:
        """Return what `keep` was told; None where nothing is kept."""
        try:
            manifest: dict[str, Any] = json.loads(os.readlink(self._manifest))
        except FileNotFoundError:
            return None
        return manifest

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of kept objects."""
        return [sysbpf.get(self._path / name) for name in names]

    def keep(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Keep the objects of these descriptors by their names, in place of what was kept."""
        self.clear()
        for name, descriptor in objects.items():
            sysbpf.pin(descriptor, self._path / name)
        os.symlink(json.dumps(manifest), self._manifest)

    def clear(self) -> None:
        """Keep nothing: what nobody else holds ends, links first."""
        self._manifest.unlink(missing_ok=True)
        for path in sorted(self._path.iterdir(), key=lambda path: not path.name.startswith("link")):
            path.unlink()

    def __enter__(self) -> "PinFolder":
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"capture.pin {self._path}: {error.strerror}") from error
        if not sysbpf.is_bpffs(self._path):
            os.close(self._lock)
            raise ConfigError(f"capture.pin {self._path}: not in a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise BusyError(f"another producer keeps its hooks in {self._path}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
