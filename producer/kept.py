"""What is known of hooks that outlive the process, written down beside them as a manifest, in JSON.

The rings' sizes and the layouts of their records are in it: the process that finds them may be of another version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from producer.events import STREAMS, Stream
from producer.rungs import Refusal


@dataclass(frozen=True, slots=True)
class KeptRing:
    """A ring, by its object's name. The stream has the dtype of the ring's records."""

    stream: Stream
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Hooks of one load, and older rings that are not drained yet, oldest first. All objects are named."""

    fingerprint: str
    """Of all that the hooks are made of."""
    ring_id: str
    rungs: Mapping[str, str]
    refusals: Sequence[Refusal]
    maps: Mapping[str, str]
    """Objects by the map's name in the programs."""
    programs: Mapping[str, Sequence[str]]
    """Objects by stream."""
    links: Sequence[str]
    rings: Sequence[KeptRing]
    old_ring_id: str | None
    """Of the last of the older rings."""
    old_rings: Sequence[KeptRing]

    @property
    def objects(self) -> list[str]:
        """The names of all objects."""
        programs = [name for names in self.programs.values() for name in names]
        return [*self.maps.values(), *programs, *self.links, *(ring.name for ring in self.old_rings)]

    def manifest(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {
            "fingerprint": self.fingerprint,
            "ring_id": self.ring_id,
            "rungs": dict(self.rungs),
            "refusals": [[each.stream, each.rung, each.reason] for each in self.refusals],
            "maps": dict(self.maps),
            "programs": {stream: list(names) for stream, names in self.programs.items()},
            "links": list(self.links),
            "rings": [_ring_manifest(ring) for ring in self.rings],
            "old_ring_id": self.old_ring_id,
            "old_rings": [_ring_manifest(ring) for ring in self.old_rings],
        }

    @classmethod
    def read(cls, manifest: Mapping[str, Any]) -> "Kept":
        """Return what a manifest says. Raises ValueError where it is another version's, and says something else."""
        try:
            known = dict(manifest)
            known["refusals"] = [Refusal(*each) for each in known["refusals"]]
            for name in ("rings", "old_rings"):
                known[name] = [_ring(ring) for ring in known[name]]
            return cls(**known)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the manifest cannot be read: {type(error).__name__}: {error}") from error


def _ring_manifest(ring: KeptRing) -> dict[str, Any]:
    layout = np.lib.format.dtype_to_descr(ring.stream.dtype)
    return {"stream": ring.stream.name, "name": ring.name, "bytes": ring.size_bytes, "layout": layout}


def _ring(ring: Mapping[str, Any]) -> KeptRing:
    stream = {stream.name: stream for stream in STREAMS}[ring["stream"]]
    dtype = np.lib.format.descr_to_dtype(_descr(ring["layout"]))
    return KeptRing(replace(stream, dtype=dtype), ring["name"], ring["bytes"])


def _descr(layout: Any) -> Any:
    """Return the description of a dtype, which is lists and strings after its way through JSON, as numpy wants it."""
    if isinstance(layout, str):
        return layout
    return [(name, _descr(kind), *map(tuple, shape)) for name, kind, *shape in layout]
