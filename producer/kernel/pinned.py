"""Maps, programs and links that outlive the process that made them, in a folder of a bpffs.

Each object is a file there. What they are is a manifest, kept with their names as the target of the symbolic link
`manifest` (a bpffs holds no other text, and of that no more than a page: it is compressed). The link is replaced at
once; files that it does not name are the remains of a start or stop that did not come to its end. All of it is gone at
a reboot. The folder is locked (flock) by the process that uses it.
"""

import base64
import fcntl
import json
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from producer.errors import BusyError, ConfigError
from producer.kernel import bpf_syscall
from producer.kernel.manifest import objects_and_manifest


class PinFolder:
    """The folder at `path`, made if need be (mode 0700), and locked while this object is entered.

    Entering raises ConfigError where there is no bpffs, BusyError where another process holds the lock.
    """

    outlives_stop = False
    """What is kept here stays until it is cleared, at a stop too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifest = path / "manifest"

    def manifest(self) -> dict[str, Any] | None:
        """Return what `keep` was told; None where nothing is kept, and nothing in it where that cannot be read."""
        try:
            manifest: dict[str, Any] = self._read()["manifest"]
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return manifest

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of kept objects. Raises OSError where one is not there."""
        opened: list[int] = []
        try:
            for name in names:
                opened.append(bpf_syscall.get(self._path / name))
        except OSError:
            bpf_syscall.close_all(opened)
            raise
        return opened

    def keep(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Keep the objects of these descriptors by their names, in place of what was kept.

        A name stands for one object for ever: what is kept by it already stays. At any moment, either the old objects
        are kept or the new ones.
        """
        for name, descriptor in objects.items():
            if not (self._path / name).exists():
                bpf_syscall.pin(descriptor, self._path / name)
        text = json.dumps({"objects": list(objects), "manifest": manifest}).encode()
        fresh = self._path / "manifest_new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(base64.urlsafe_b64encode(zlib.compress(text)).decode())
        fresh.replace(self._manifest)
        self._remove_all_but(objects)

    def clear(self) -> None:
        """Keep nothing: what nobody else holds ends, links first."""
        self._manifest.unlink(missing_ok=True)
        self._remove_all_but(())

    def _read(self) -> dict[str, Any]:
        """Raises FileNotFoundError where there is no manifest, ValueError where it is another version's."""
        try:
            target = os.readlink(self._manifest)
            return objects_and_manifest(zlib.decompress(base64.urlsafe_b64decode(target)))
        except FileNotFoundError:
            raise
        except (OSError, zlib.error) as error:  # no link
            raise ValueError(str(error)) from error

    def _remove_all_but(self, names: Collection[str]) -> None:
        for path in sorted(self._path.iterdir(), key=lambda path: not path.name.startswith("link")):
            if path != self._manifest and path.name not in names:
                path.unlink()

    def _remove_remains(self) -> None:
        try:
            self._remove_all_but(self._read()["objects"])
        except FileNotFoundError:
            self._remove_all_but(())
        except ValueError:
            return  # they go when others are kept

    def __enter__(self) -> "PinFolder":
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"capture.pin {self._path}: {error.strerror}") from error
        if not bpf_syscall.is_bpffs(self._path):
            os.close(self._lock)
            raise ConfigError(f"capture.pin {self._path}: not in a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise BusyError(f"another producer keeps its hooks in {self._path}") from error
        self._remove_remains()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
