"""How to capture: hooks, streams, rings and programs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from producer.events import HOOKS, STREAMS, Stream
from producer.rules.tables import Action, Tables, tables

_WAKEUP_SHARE = 4
_LEAST_WAKEUP_EVENTS = 256


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """How to capture. Ring sizes are in bytes, by ring name: powers of two, at least a page."""

    hooks: tuple[str, ...] = HOOKS
    """Those allowed for transmits and retransmits."""
    streams: tuple[Stream, ...] = STREAMS
    """Those to capture, at least one."""
    ring_bytes: Mapping[str, int] = field(
        default_factory=lambda: {"transmit_pipe": 1 << 24, "retransmit_pipe": 1 << 22, "flow_pipe": 1 << 22}
    )
    rules: Tables = field(default_factory=lambda: tables((), Action()))
    """Which segments become events; by default all."""
    btf: Path | None = None
    programs: Path | None = None
    """A file of `rebpf compile`, or a folder with such files."""
    cache: Path | None = None
    """The folder of the program cache. None: compile at each start."""

    def wakeup_mask(self, stream: Stream) -> int:
        """Return how often each CPU wakes the process: at every event whose number has none of these bits.

        That is before all CPUs together have filled a quarter of the stream's ring. On a host with many CPUs each waits
        for 256 events nevertheless, as their wake-ups add up.
        """
        records = self.ring_bytes.get(stream.ring, 0) // stream.dtype.itemsize
        events = max(_LEAST_WAKEUP_EVENTS, records // _WAKEUP_SHARE // (os.cpu_count() or 1))
        return (1 << events.bit_length() - 1) - 1
