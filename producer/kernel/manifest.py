"""What is known of hooks that outlive the process, written down beside them as a manifest, in JSON.

The rings' sizes and the layouts of their records are in it: the process that finds them may be of another version.
"""

import logging
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from producer.events import STREAMS, Stream
from producer.host import state_file
from producer.kernel import bpf_syscall
from producer.kernel.hooks import Refusal
from producer.kernel.ringbuf import Ring

logger = logging.getLogger(__name__)

COUNTERS = struct.Struct("<4Q")
"""struct counters in bpf/maps.h: passed, lost_ring_full, seq, forgotten."""
_MOST_RECORD_BYTES = 1 << 12


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
            return _checked(cls(**known))
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"the manifest cannot be read: {type(error).__name__}: {error}") from error


def objects_and_manifest(text: bytes) -> dict[str, Any]:
    """Return what a keeper has written: the objects' names, and the manifest. Raises ValueError if it is not that."""
    content = state_file.parse(text)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("manifest"), dict)
        or not isinstance(content.get("objects"), list)
        or not all(isinstance(name, str) for name in content["objects"])
    ):
        raise ValueError("not the names of objects and a manifest")
    return content


def usable(kept: Kept, opened: Mapping[str, int]) -> Kept:
    """Return what was kept without the older rings that cannot be read; `opened` are descriptors by name.

    Raises OSError, LookupError or ValueError where one of the rings, or the counters, is not what the manifest says.
    """
    for ring in kept.rings:
        _try(ring, opened)
    counters = bpf_syscall.map_info(opened[kept.maps["counters"]])
    if (counters.key_size, counters.value_size) != (4, COUNTERS.size):
        raise ValueError("the counters have another size")
    old_rings = []
    for ring in kept.old_rings:
        try:
            _try(ring, opened)
            old_rings.append(ring)
        except (OSError, ValueError) as error:
            logger.error("hooks: %s cannot be read, and the events in it are lost: %s", ring.name, error)
    return replace(kept, old_rings=old_rings)


def _try(ring: KeptRing, opened: Mapping[str, int]) -> None:
    Ring(opened[ring.name], ring.size_bytes, ring.stream.dtype).close()


def _checked(kept: Kept) -> Kept:
    """Return what a manifest says. Raises ValueError, TypeError or AttributeError where it does not hang together."""
    names = [
        kept.fingerprint,
        kept.ring_id,
        *kept.rungs.values(),
        *(text for each in kept.refusals for text in (each.stream, each.rung, each.reason)),
        *kept.objects,
    ]
    if not all(isinstance(name, str) for name in names) or not isinstance(kept.old_ring_id, str | None):
        raise ValueError("a name is no text")
    streams = {stream.name for stream in STREAMS}
    if kept.rungs.keys() != streams or kept.programs.keys() != streams or "own_sockets" not in kept.maps:
        raise ValueError("a stream or a map is missing")
    if [ring.stream.name for ring in kept.rings] != [stream.name for stream in STREAMS]:
        raise ValueError("a ring is missing")
    if not {ring.name for ring in kept.rings} <= {*kept.maps.values()}:
        raise ValueError("a ring is no map")
    return kept


def _ring_manifest(ring: KeptRing) -> dict[str, Any]:
    layout = np.lib.format.dtype_to_descr(ring.stream.dtype)
    return {"stream": ring.stream.name, "name": ring.name, "bytes": ring.size_bytes, "layout": layout}


def _ring(ring: Mapping[str, Any]) -> KeptRing:
    stream = {stream.name: stream for stream in STREAMS}[ring["stream"]]
    dtype = np.lib.format.descr_to_dtype(_descr(ring["layout"]))
    if dtype.hasobject or dtype.itemsize % 8 or not 0 < dtype.itemsize <= _MOST_RECORD_BYTES:
        raise ValueError(f"no record of a ring: {dtype}")
    size_bytes = ring["bytes"]
    if type(size_bytes) is not int or not mmap.PAGESIZE <= size_bytes < 1 << 32 or size_bytes & size_bytes - 1:
        raise ValueError(f"no size of a ring: {size_bytes!r}")
    return KeptRing(replace(stream, dtype=dtype), ring["name"], size_bytes)


def _descr(layout: Any) -> Any:
    """Return the description of a dtype, which is lists and strings after its way through JSON, as numpy wants it."""
    if isinstance(layout, str):
        return layout
    return [(name, _descr(kind), *map(tuple, shape)) for name, kind, *shape in layout]
