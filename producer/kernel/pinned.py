"""Maps, programs and links pinned in a folder of a bpffs, so that they outlive the process.

Each object is a file. Their names and the manifest are the target of the symbolic link `manifest`: a bpffs can hold no
other text, and no more than a page of it, so it is compressed. The link is replaced atomically. Files that it does not
name were left by an interrupted start or stop. A reboot removes everything. The process that uses the folder locks it
(flock).

Files that are not ours are never removed: other programs pin their objects in the same bpffs. The folder must belong to
this user and be writable only by it, or others could pin objects for us to take over.
"""

import base64
import contextlib
import fcntl
import json
import logging
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from producer.errors import BusyError, ConfigError, UnavailableError
from producer.host.state import LOCKING
from producer.kernel import bpf_syscall
from producer.kernel.manifest import parse_stored

logger = logging.getLogger(__name__)

_OURS = re.compile(r"manifest(_new)?|[a-z_]+(_\d+)?_[0-9a-f]{16}")
"""Names of the manifest and of objects, which end with the ring's id."""


def unusable(path: Path) -> str | None:
    """Return why a folder in a bpffs cannot be used, or created if it does not exist; None if it can."""
    existing = next(each for each in (path, *path.parents) if each.exists())
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        return "is read-only here: remount it, or set ProtectKernelTunables=no and ReadWritePaths= of the unit"
    if existing != path:
        dotted = next((part for part in path.relative_to(existing).parts if "." in part), None)
        return f"a bpffs has no names with dots: choose another one than {dotted}" if dotted else None
    status, user = path.stat(), os.geteuid()
    if status.st_uid != user or status.st_mode & 0o022:
        return f"expected a folder that belongs to uid {user} and that nobody else can write to: create another one"
    others = sorted(name for name in os.listdir(path) if not _OURS.fullmatch(name))
    return f"contains objects of other programs ({others[0]}): use a separate folder" if others else None


def is_locked(path: Path) -> bool:
    """Return whether a producer uses the folder. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(folder)
    return False


def in_use(path: Path) -> str:
    """Return the message for a folder that another producer uses."""
    return f"another producer has pinned its hooks in {path}"


class PinFolder:
    """The folder at `path`, created if necessary (mode 0700), and locked while this object is entered.

    Entering raises ConfigError if there is no bpffs, BusyError if another process holds the lock.
    """

    outlives_stop = False
    """Pins stay until they are cleared, so a stop clears them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifest = path / "manifest"
        self._names: set[str] = set()
        """What is pinned."""

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest given to `save`: None if nothing is pinned, empty if it cannot be read."""
        try:
            stored = self._read()
            manifest: dict[str, Any] = stored["manifest"]
            self._names = set(stored["objects"])
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return manifest

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of pinned objects. OSError if one is missing."""
        return bpf_syscall.open_all(bpf_syscall.get(self._path / name) for name in names)

    def save(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Pin the objects of these descriptors by name, and unpin all others.

        A name always refers to the same object, so an existing pin stays. At any moment, either the old objects are
        complete or the new ones.
        """
        for name, descriptor in objects.items():
            if not (self._path / name).exists():
                bpf_syscall.pin(descriptor, self._path / name)
        text = json.dumps({"objects": list(objects), "manifest": manifest}).encode()
        fresh = self._path / "manifest_new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(base64.urlsafe_b64encode(zlib.compress(text)).decode())
        fresh.replace(self._manifest)
        self._names = set(objects)
        self._remove_all_but(objects)

    def check(self) -> None:
        """Raise UnavailableError if the folder or something in it is gone: someone removed or unmounted it."""
        try:
            is_same = os.path.samestat(os.stat(self._path), os.fstat(self._lock))
            missing = self._names - set(os.listdir(self._lock))
        except FileNotFoundError:
            is_same, missing = False, set()
        if not is_same or missing:
            what = min(missing, default="the folder")
            text = f"capture.pin {self._path}: {what} is gone, so a crash would lose the events in the rings: restart"
            raise UnavailableError(text)

    def clear(self) -> None:
        """Unpin everything, links first. The kernel releases what no one else holds."""
        self._names = set()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._manifest.name, dir_fd=self._lock)
            self._remove_all_but(())
        except OSError as error:  # must not end the stop
            logger.warning("hooks stay pinned, without rules: %s", error)

    def _read(self) -> dict[str, Any]:
        """Raises FileNotFoundError if there is no manifest, ValueError if it is another version's."""
        try:
            target = os.readlink(self._manifest)
            return parse_stored(zlib.decompress(base64.urlsafe_b64decode(target)))
        except FileNotFoundError:
            raise
        except (OSError, zlib.error) as error:  # not a link
            raise ValueError(str(error)) from error

    def _remove_all_but(self, names: Collection[str]) -> None:
        """Remove our other files from the folder that was opened: at its path there may be another one by now."""
        with contextlib.suppress(FileNotFoundError):  # the folder, or a file, was removed by someone else
            for name in sorted(os.listdir(self._lock), key=lambda name: not name.startswith("link")):
                if _OURS.fullmatch(name) and name != self._manifest.name and name not in names:
                    os.unlink(name, dir_fd=self._lock)

    def _remove_remains(self) -> None:
        try:
            self._remove_all_but(self._read()["objects"])
        except FileNotFoundError:
            self._remove_all_but(())
        except ValueError:
            return  # the next `save` removes them

    def __enter__(self) -> "PinFolder":
        path = self._path.absolute()
        try:
            if not bpf_syscall.is_bpffs(next(each for each in (path, *path.parents) if each.exists())):
                raise ConfigError(f"capture.pin {self._path}: not in a bpffs. Mount one: mount -t bpf bpf /sys/fs/bpf")
            if why := unusable(path):
                raise ConfigError(f"capture.pin {self._path}: {why}")
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"capture.pin {self._path}: {error.strerror}") from error
        if why := unusable(self._path):
            os.close(self._lock)
            raise ConfigError(f"capture.pin {self._path}: {why}")
        try:
            LOCKING(fcntl.flock, self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise BusyError(in_use(self._path)) from error
        self._remove_remains()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
