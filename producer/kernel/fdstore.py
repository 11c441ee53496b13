"""Maps, programs and links that outlive the process that made them, in systemd's file descriptor store.

systemd holds a copy of each descriptor by its name, and hands all of them to the next process of the service, after a
crash as after `systemctl restart`; at `systemctl stop` it lets go of them. What they are is a manifest, with their
names, in a sealed memory file that is stored behind them. Of two manifests the later one counts: the earlier one was
about to be removed. What the manifest does not name are the remains of a start or stop that did not come to its end.
Only the service's main process can store (NotifyAccess=main), and at most FileDescriptorStoreMax= descriptors.

systemd never says what it has stored. That it would is in the environment variable FDSTORE, the number of descriptors
that it allows: it sets that itself from version 254 on, and before, the unit does (Environment=FDSTORE=). Nothing else
tells: NOTIFY_SOCKET is set for services without a store too, and LISTEN_FDS only from the second start on.
"""

import fcntl
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from producer.errors import ConfigError
from producer.host.systemd import barrier, notify, number
from producer.kernel.manifest import objects_and_manifest

logger = logging.getLogger(__name__)

_MOST_DESCRIPTORS = 1 << 16
_MOST_MANIFEST_BYTES = 1 << 20
_MOST_DIGITS = 18
_FIRST = 3  # SD_LISTEN_FDS_START
_MANIFEST = "manifest_"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


def available() -> bool:
    """Whether this process is a systemd service with a file descriptor store."""
    return bool(os.environ.get("NOTIFY_SOCKET")) and _limit() > 0


class FdStore:
    """The store of the service that this process is. Entering takes what systemd handed over, at most once a process.

    What systemd keeps is held here too, until it is cleared or this object is left.
    """

    outlives_stop = True
    """Only systemd knows whether a stop is the first half of a restart: it ends what is kept where it is not."""

    def __init__(self) -> None:
        self._kept: dict[str, int] = {}

    def manifest(self) -> dict[str, Any] | None:
        """Return what `keep` was told; None where nothing is kept, and nothing in it where that cannot be read."""
        name = self._manifest_name()
        if name is None:
            return None
        try:
            manifest: dict[str, Any] = self._read(name)["manifest"]
        except (OSError, ValueError, LookupError):
            return {}
        return manifest

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of kept objects. Raises LookupError where one is not there."""
        return [os.dup(descriptor) for descriptor in [self._kept[name] for name in names]]

    def keep(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Keep the objects of these descriptors by their names, in place of what was kept.

        A name stands for one object for ever: what is kept by it already stays. At any moment, either the old objects
        are kept or the new ones. Raises ConfigError where the store is too small for both.
        """
        needed = len(self._kept.keys() | objects.keys()) + 1
        if needed > _limit():
            raise ConfigError(f"FileDescriptorStoreMax={_limit()} of the unit is too small: {needed} are needed")
        for name, descriptor in objects.items():
            if name not in self._kept:
                self._store(name, os.dup(descriptor))
        fresh = f"{_MANIFEST}{_number(self._manifest_name()) + 1}"
        self._store(fresh, _sealed(json.dumps({"objects": list(objects), "manifest": manifest}).encode()))
        self._remove_all_but({fresh, *objects})
        barrier()

    def clear(self) -> None:
        """Keep nothing: what nobody else holds ends, links first.

        From version 254 on systemd closes what it removes in a thread of its own, which may be a moment later.
        """
        self._remove_all_but(())
        barrier()

    def _manifest_name(self) -> str | None:
        return max((name for name in self._kept if name.startswith(_MANIFEST)), key=_number, default=None)

    def _read(self, name: str) -> dict[str, Any]:
        descriptor = self._kept[name]
        return objects_and_manifest(os.pread(descriptor, _MOST_MANIFEST_BYTES, 0))

    def _remove_all_but(self, names: Collection[str]) -> None:
        for name in sorted(self._kept.keys() - names, key=_order):
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
            os.close(self._kept.pop(name))

    def _remove_remains(self) -> None:
        name = self._manifest_name()
        try:
            self._remove_all_but({name, *self._read(name)["objects"]} if name else ())
        except (OSError, ValueError, LookupError):
            return  # another version's: they go when others are kept

    def _store(self, name: str, descriptor: int) -> None:
        self._kept[name] = descriptor
        # FDPOLL=0: systemd shall not drop a descriptor because it is at its end, as poll(2) has it.
        notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])

    def __enter__(self) -> "FdStore":
        self._kept = _handed_over()
        self._remove_remains()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._kept.values():
            os.close(descriptor)
        self._kept = {}


def _limit() -> int:
    return number("FDSTORE", 1 << 31)


def _number(manifest: str | None) -> int:
    digits = manifest.removeprefix(_MANIFEST) if manifest else ""
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < _MOST_DIGITS else 0


def _order(name: str) -> tuple[bool, bool, int]:
    """Manifests are removed first, the earlier before the later, and then links."""
    is_manifest = name.startswith(_MANIFEST)
    return not is_manifest, not name.startswith("link"), _number(name) if is_manifest else 0


def _handed_over() -> dict[str, int]:
    """Return the descriptors that systemd handed to this process, by name; neither they nor the word go on to children.

    The variables of another process, which this one has inherited, are none of its business: sd_listen_fds(3).
    """
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    count, names = number("LISTEN_FDS", _MOST_DESCRIPTORS), os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in [name for name in os.environ if name.startswith("LISTEN_")]:
        del os.environ[variable]
    if not mine or not count:
        return {}
    descriptors = [descriptor for descriptor in range(_FIRST, _FIRST + count) if _is_open(descriptor)]
    if len(descriptors) != count or len(names) != count or len(set(names)) != count:
        logger.warning("LISTEN_FDS and LISTEN_FDNAMES do not fit the descriptors of this process: none is taken over")
        return {}
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return dict(zip(names, descriptors, strict=True))


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _sealed(content: bytes) -> int:
    """Return a memory file that nobody can change."""
    descriptor = os.memfd_create("manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor
