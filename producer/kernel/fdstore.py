"""Maps, programs and links in systemd's file descriptor store, so that they outlive the process.

systemd holds a copy of each descriptor by name, and passes all of them to the next process of the service, after a
crash or `systemctl restart`. At `systemctl stop` it closes them. Their names and the manifest are in a sealed memory
file, stored after them. If there are two manifests, the later one is valid: the earlier one was about to be removed.
Descriptors that the manifest does not name were left by an interrupted start or stop. Only the service's main process
can store (NotifyAccess=main), and at most FileDescriptorStoreMax= descriptors.

systemd never reports what it has stored. The only sign of a store is the environment variable FDSTORE, the number of
descriptors that it allows. systemd sets it from version 254; before that, the unit does (Environment=FDSTORE=).
NOTIFY_SOCKET is also set for services without a store, and LISTEN_FDS only from the second start on.
"""

import fcntl
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from producer.errors import ConfigError
from producer.host.systemd import barrier, is_service, notify, number
from producer.kernel.bpf_syscall import open_all
from producer.kernel.manifest import parse_stored

logger = logging.getLogger(__name__)

_MOST_DESCRIPTORS = 1 << 16
_MOST_MANIFEST_BYTES = 1 << 20
_MOST_DIGITS = 18
_FIRST = 3  # SD_LISTEN_FDS_START
_MANIFEST = "manifest_"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


def available() -> bool:
    """Whether this process is a systemd service with a file descriptor store."""
    return is_service() and _limit() > 0


class FdStore:
    """The store of this service. Entering it takes the descriptors that systemd passed, at most once per process.

    This object holds a copy of each stored descriptor until it is cleared or exited.
    """

    outlives_stop = True
    """Only systemd knows whether a stop is part of a restart; if it is not, systemd closes the descriptors."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest given to `save`: None if nothing is stored, empty if it cannot be read."""
        name = self._manifest_name()
        if name is None:
            return None
        try:
            manifest: dict[str, Any] = self._read(name)["manifest"]
        except (OSError, ValueError, LookupError):
            return {}
        return manifest

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of stored objects. LookupError if one is missing."""
        return open_all(map(os.dup, [self._held[name] for name in names]))

    def save(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Store the objects of these descriptors by name, and remove all others.

        A name always refers to the same object, so a stored one stays. At any moment, either the old objects are
        complete or the new ones. ConfigError if the store is too small for both.
        """
        needed = len(self._held.keys() | objects.keys()) + 1
        if needed > _limit():
            raise ConfigError(f"FileDescriptorStoreMax={_limit()} of the unit is too small: {needed} are needed")
        for name, descriptor in objects.items():
            if name not in self._held:
                self._store(name, os.dup(descriptor))
        fresh = f"{_MANIFEST}{_number(self._manifest_name()) + 1}"
        self._store(fresh, _sealed(json.dumps({"objects": list(objects), "manifest": manifest}).encode()))
        self._remove_all_but({fresh, *objects})
        barrier()

    def clear(self) -> None:
        """Remove everything, links first. The kernel releases what no one else holds.

        From version 254, systemd closes removed descriptors in a separate thread, which may be a moment later.
        """
        self._remove_all_but(())
        barrier()

    def _manifest_name(self) -> str | None:
        return max((name for name in self._held if name.startswith(_MANIFEST)), key=_number, default=None)

    def _read(self, name: str) -> dict[str, Any]:
        descriptor = self._held[name]
        return parse_stored(os.pread(descriptor, _MOST_MANIFEST_BYTES, 0))

    def check(self) -> None:
        """Do nothing: only systemd can take descriptors away."""

    def _remove_all_but(self, names: Collection[str]) -> None:
        for name in sorted(self._held.keys() - names, key=_order):
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
            os.close(self._held.pop(name))

    def _remove_remains(self) -> None:
        name = self._manifest_name()
        try:
            self._remove_all_but({name, *self._read(name)["objects"]} if name else ())
        except (OSError, ValueError, LookupError):
            return  # another version's manifest: the next `save` removes them

    def _store(self, name: str, descriptor: int) -> None:
        self._held[name] = descriptor
        # FDPOLL=0: otherwise systemd drops a descriptor for which poll(2) reports an end.
        notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])

    def __enter__(self) -> "FdStore":
        self._held = _handed_over()
        self._remove_remains()
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held = {}


def _limit() -> int:
    return number("FDSTORE", 1 << 31)


def _number(manifest: str | None) -> int:
    digits = manifest.removeprefix(_MANIFEST) if manifest else ""
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < _MOST_DIGITS else 0


def _order(name: str) -> tuple[bool, bool, int]:
    """Sort manifests first, the earlier before the later, then links."""
    is_manifest = name.startswith(_MANIFEST)
    return not is_manifest, not name.startswith("link"), _number(name) if is_manifest else 0


def _handed_over() -> dict[str, int]:
    """Return the descriptors that systemd passed to this process, by name. Children inherit neither them nor LISTEN_*.

    Variables meant for another process are ignored: sd_listen_fds(3).
    """
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    count, names = number("LISTEN_FDS", _MOST_DESCRIPTORS), os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in [name for name in os.environ if name.startswith("LISTEN_")]:
        del os.environ[variable]
    if not mine or not count:
        return {}
    descriptors = [descriptor for descriptor in range(_FIRST, _FIRST + count) if _is_open(descriptor)]
    if len(descriptors) != count or len(names) != count or len(set(names)) != count:
        logger.warning("LISTEN_FDS and LISTEN_FDNAMES do not match the open descriptors: none is taken over")
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
    """Return a memory file that no one can change."""
    descriptor = os.memfd_create("manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor
