"""The manifest: JSON stored with probes that outlive the process, which describes them to the next one.

It contains the sizes of the rings and the layouts of their records, because the next process may be another version.
"""

import logging
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import numpy as np

from producer.events import STREAMS, Stream
from producer.host.text import parse_json
from producer.kernel import bpf_syscall
from producer.kernel.hooks import Refusal
from producer.kernel.ringbuf import Ring

logger = logging.getLogger(__name__)

COUNTERS = struct.Struct("<5Q")
"""struct counters in bpf/events.h: begin, lost_ring_full, seq, forgotten, wakeup_mask."""
_MOST_RECORD_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class StoredRing:
    """A ring, by the name of its object. The stream has the dtype of the ring's records."""

    stream: Stream
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The objects of one load, and older rings that are not yet drained, oldest first; all by name."""

    fingerprint: str
    """Digest of everything that defines programs and maps."""
    ring_id: str
    hooks: Mapping[str, str]
    refusals: Sequence[Refusal]
    maps: Mapping[str, str]
    """Object names by the map's name in the programs."""
    programs: Mapping[str, Sequence[str]]
    """Object names by stream."""
    links: Sequence[str]
    rings: Sequence[StoredRing]
    old_ring_id: str | None
    """Of the newest old rings."""
    old_rings: Sequence[StoredRing]
    iterators: Sequence[str] = field(default_factory=list)
    """Those of the links through which flows are read."""

    @property
    def objects(self) -> list[str]:
        """The names of all objects."""
        programs = [name for names in self.programs.values() for name in names]
        return [*self.maps.values(), *programs, *self.links, *(ring.name for ring in self.old_rings)]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "refusals": [astuple(each) for each in self.refusals],
            "rings": [_ring_json(ring) for ring in self.rings],
            "old_rings": [_ring_json(ring) for ring in self.old_rings],
        }

    @classmethod
    def from_json(cls, manifest: Mapping[str, Any]) -> "Manifest":
        """Return the manifest. ValueError if it is invalid or has another version's layout."""
        try:
            known = dict(manifest)
            known["refusals"] = [Refusal(*each) for each in known["refusals"]]
            for name in ("rings", "old_rings"):
                known[name] = [_ring(ring) for ring in known[name]]
            return _checked(cls(**known))
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"the manifest cannot be read: {type(error).__name__}: {error}") from error


def parse_stored(text: bytes) -> dict[str, Any]:
    """Return what a store has saved: the names of the objects, and the manifest. ValueError if it is neither."""
    content = parse_json(text)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("manifest"), dict)
        or not isinstance(content.get("objects"), list)
        or not all(isinstance(name, str) for name in content["objects"])
    ):
        raise ValueError("expected object names and a manifest")
    return content


def with_readable_rings(manifest: Manifest, opened: Mapping[str, int]) -> Manifest:
    """Return the manifest without the old rings that cannot be read. `opened` has descriptors by name.

    OSError, LookupError or ValueError if a current ring or the counters do not match the manifest.
    """
    for ring in manifest.rings:
        _try(ring, opened)
    counters = bpf_syscall.map_info(opened[manifest.maps["counters"]])
    if (counters.key_size, counters.value_size) != (4, COUNTERS.size):
        raise ValueError("the counters have an unexpected size")
    old_rings = []
    for ring in manifest.old_rings:
        try:
            _try(ring, opened)
            old_rings.append(ring)
        except (OSError, ValueError) as error:
            logger.error("hooks: old ring %s cannot be read, its events are lost: %s", ring.name, error)
    return replace(manifest, old_rings=old_rings)


def _try(ring: StoredRing, opened: Mapping[str, int]) -> None:
    Ring(opened[ring.name], ring.size_bytes, ring.stream.dtype).close()


def _checked(manifest: Manifest) -> Manifest:
    """Return the manifest. ValueError, TypeError or AttributeError if it is inconsistent."""
    names = [
        manifest.fingerprint,
        manifest.ring_id,
        *manifest.hooks.values(),
        *(text for each in manifest.refusals for text in (each.stream, each.hook, each.reason)),
        *manifest.objects,
    ]
    if not all(isinstance(name, str) for name in names) or not isinstance(manifest.old_ring_id, str | None):
        raise ValueError("a name is not text")
    streams = manifest.hooks.keys()
    if not streams or manifest.programs.keys() != streams:
        raise ValueError("a stream is missing")
    if "own_sockets" not in manifest.maps:
        raise ValueError("a map is missing")
    if {ring.stream.name for ring in manifest.rings} != streams or len(manifest.rings) != len(streams):
        raise ValueError("a ring is missing")
    if not {*manifest.iterators} <= {*manifest.links}:
        raise ValueError("an iterator is missing among the links")
    if not {ring.name for ring in manifest.rings} <= {*manifest.maps.values()}:
        raise ValueError("a ring is missing among the maps")
    return manifest


def _ring_json(ring: StoredRing) -> dict[str, Any]:
    layout = np.lib.format.dtype_to_descr(ring.stream.dtype)
    return {"stream": ring.stream.name, "name": ring.name, "bytes": ring.size_bytes, "layout": layout}


def _ring(ring: Mapping[str, Any]) -> StoredRing:
    stream = {stream.name: stream for stream in STREAMS}[ring["stream"]]
    dtype = np.lib.format.descr_to_dtype(_descr(ring["layout"]))
    if dtype.hasobject or dtype.itemsize % 8 or not 0 < dtype.itemsize <= _MOST_RECORD_BYTES:
        raise ValueError(f"invalid record layout: {dtype}")
    size_bytes = ring["bytes"]
    if type(size_bytes) is not int or not mmap.PAGESIZE <= size_bytes < 1 << 32 or size_bytes & size_bytes - 1:
        raise ValueError(f"invalid ring size: {size_bytes!r}")
    return StoredRing(replace(stream, dtype=dtype), ring["name"], size_bytes)


def _descr(layout: Any) -> Any:
    """Convert a dtype's description from JSON's lists back to the tuples that numpy expects."""
    if isinstance(layout, str):
        return layout
    return [(name, _descr(kind), *map(tuple, shape)) for name, kind, *shape in layout]
