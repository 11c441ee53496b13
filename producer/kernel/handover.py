"""The store that holds the kernel's objects for the next process, as a capture uses it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class HandoverStore(Protocol):
    """Holds maps, programs and links by name for the next process. A name always refers to the same object."""

    @property
    def outlives_stop(self) -> bool:
        """Whether the probes stay attached at a stop, because the store itself releases them when that is final."""

    def manifest(self) -> Mapping[str, Any] | None:
        """Return the manifest given to `save`: None if nothing is stored, empty if it cannot be read."""

    def open(self, names: Sequence[str]) -> list[int]:
        """Return new descriptors of stored objects. OSError or LookupError if one is missing."""

    def save(self, objects: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
        """Store the objects of these descriptors by name, and release all others."""

    def check(self) -> None:
        """Raise UnavailableError if something that was stored is gone."""

    def clear(self) -> None:
        """Release everything."""
