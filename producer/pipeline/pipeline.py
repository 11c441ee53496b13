"""Moves the events of all streams: read rows from the ring, encode them, send them to Kafka or spill them to disk, and
free the ring's space once they are safe.

The ring is the log: the kernel gets a batch's space back only when every message of it and of all batches before it is
acknowledged or rejected for good, or when the batch is in the spool. So undelivered events have one order: first the
spool, then the ring. A window of them is in flight. While Kafka accepts messages, the spool is empty and nothing is
written to disk. When Kafka does not, the batches in flight are spilled, then the new ones; new events are sent after
the spooled ones until the spool is empty. If the spool fails too (a full disk), events stay in the ring, and when the
ring is full, the kernel counts what it cannot store. Nothing else is buffered, and nothing blocks.

One thread calls `step` in a loop. Files and clocks are reached only through the objects passed in.
"""

from collections.abc import Callable, Sequence
from functools import partial

from producer.pipeline.interfaces import Sink
from producer.pipeline.stream import StreamPath


class Pipeline:
    """Moves events of all `paths` to `sink`.

    `now_s` returns the monotonic clock in seconds, `utc_offset_ns` its offset to UTC. `delivered` is called per batch
    with the seconds from the kernel to the acknowledgement, and its number of events. `guard` runs the work of one
    stream, by its name, and handles its failures, so that the other streams continue.
    """

    def __init__(
        self,
        paths: Sequence[StreamPath],
        sink: Sink,
        now_s: Callable[[], float],
        utc_offset_ns: Callable[[], int],
        delivered: Callable[[float, int], None] = lambda seconds, count: None,
        guard: Callable[[str, Callable[[], bool]], bool] = lambda stream, work: work(),
    ) -> None:
        self._paths = {path.stream.name: path for path in paths}
        self._sink = sink
        self._now_s = now_s
        self._utc_offset_ns = utc_offset_ns
        self._delivered = delivered
        self._guard = guard

    def step(self) -> bool:
        """Move events of each stream, and process delivery reports; return whether there are likely more events."""
        more = False
        for name, path in self._paths.items():
            more |= self._guard(name, partial(path.step, self._sink, self._now_s(), self._utc_offset_ns()))
        self.poll_reports()
        return more

    def poll_reports(self) -> None:
        """Process delivery reports."""
        outcomes = self._sink.poll()
        for name in self._paths.keys() & outcomes.keys():  # heartbeats have no path
            for oldest_ns, count in self._paths[name].on_reports(outcomes[name]):
                self._delivered(self._now_s() - oldest_ns / 1e9, count)

    def spill_all(self, until_s: float = float("inf")) -> None:
        """Spill all unacknowledged events, as far as the spools take them.

        A ring that is still being filled may never be empty, so this ends when the clock reaches `until_s`.
        """
        for path in self._paths.values():
            path.spill_all(self._now_s(), self._utc_offset_ns(), lambda: self._now_s() >= until_s)
