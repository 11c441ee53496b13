"""Records of this host, straight from the kernel: a separate set of hooks and rings, and no Kafka.

A producer that runs beside it keeps its own hooks, rings and events. The hooks live as long as descriptors of this
process, so the kernel removes them however it ends. Records pass through the producer's encoder, so that they are the
same as in the topics.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from producer.consume.decode import Decoder
from producer.encode.batch import BatchEncoder
from producer.errors import PermissionDenied
from producer.events import FLOWS, Batch, Stream
from producer.host.cgroups import CgroupPaths, cgroup2_root
from producer.host.clock import UtcOffset, boot_id
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from producer.schemas import load_schema
from producer.view.records import Records
from producer.view.unseen import Unseen

_RING_BYTES = {"transmit_pipe": 1 << 24, "retransmit_pipe": 1 << 22, "flow_pipe": 1 << 25}
"""The ring of flows holds a record of each of 70,000 connections."""
_BATCH = 8192


class LocalSource:
    """The records of this host from `__enter__` on."""

    is_local = True

    def __init__(
        self,
        streams: Sequence[Stream],
        host_fields: Mapping[str, Any],
        *,
        cache: Path | None = None,
        btf: Path | None = None,
        programs: Path | None = None,
    ) -> None:
        self._streams = streams
        settings = CaptureSettings(streams=(*streams,), ring_bytes=_RING_BYTES, cache=cache, btf=btf, programs=programs)
        self._capture = Capture(settings)
        fields = {**host_fields, "boot_id": boot_id()}
        cgroups = CgroupPaths(cgroup2_root())
        self._encoders = {
            stream: BatchEncoder(
                stream, load_schema(stream.schema_file), stream.fixed_schema_id, fields, cgroups, "host"
            )
            for stream in streams
        }
        self._decoder = Decoder(None)
        self._utc_offset = UtcOffset()
        self._unseen = Unseen()
        self._reports = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise PermissionDenied("capturing needs root: use sudo, or read topics with `rebpf top --brokers`")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._capture)
            self._capture.load()
            self._rings = {stream: stack.enter_context(self._capture.ring(stream)) for stream in self._streams}
            self._capture.attach()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def earlier(self) -> list[Records]:
        """Return nothing: the first report has what is needed."""
        return []

    def read(self) -> list[Records]:
        """Return the new records: of each ring at most as many as it holds, since it may fill as fast as it is read."""
        found = []
        for stream, ring in self._rings.items():
            end = ring.position + _RING_BYTES[stream.ring]
            while ring.position < end and len(rows := ring.read(_BATCH)):
                if stream == FLOWS:
                    self._unseen.add(rows, beginning=self._reports <= 1)
                encoded = self._encoders[stream].encode(Batch(stream, rows), self._utc_offset())
                ring.commit(ring.position)
                parts, _ = self._decoder.tables([*encoded.values()])
                found += [Records.from_table(stream, table) for _, table in parts]
        return found

    def report(self) -> None:
        """Ask the kernel for a record of each open connection."""
        if FLOWS in self._streams:
            self._reports += 1
            self._capture.report_flows()

    def lost(self) -> int:
        """Return the number of events that did not fit a ring, or that the kernel skipped, by the last report.

        Programs of connections are attached twice, so a skipped run of one is no loss. What they miss, the tracepoint's
        program for retransmissions misses, too, and the kernel may not count it.
        """
        counters = {stream: self._capture.counters(stream) for stream in self._streams}
        lost = sum(each.ring_full + (each.nested if stream != FLOWS else 0) for stream, each in counters.items())
        return lost + (self._unseen.segs if self._capture.hooks_in_use.get("retransmit") == "raw_tp" else 0)
