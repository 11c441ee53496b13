"""The way of the data, for all streams: rows out of a ring, encoded, sent to Kafka or put on disk, and the ring's room
given back once they are safe.

The ring is the log: a batch's room goes back to the kernel only when Kafka has acknowledged (or finally refused) every
message of it and of all before it, or when it is in the spool. So what waits for Kafka waits in one order: first what
is in the spool, then what is in the ring; a window of that is under way to Kafka. While Kafka takes what it is sent,
the spool is empty and nothing is written. When it does not, the spool takes what is under way and then what comes; what
is new is sent behind what is in the spool until that is empty. Where the spool takes nothing either (a full disk),
events stay in the ring, and when that is full, the kernel counts what it cannot take. Nothing else is buffered, and
nothing waits.

One thread calls `step` in a loop. Nothing here opens a file or reads a clock but through what it is given.
"""

from collections.abc import Callable, Sequence
from functools import partial

from producer.pipeline.interfaces import Sink
from producer.pipeline.stream import StreamPath


class Pipeline:
    """Moves events of all `paths` to `sink`.

    `now_s` returns the monotonic clock's seconds, `utc_offset_ns` what it lacks to UTC; `delivered` is told how long
    a batch took from the kernel to its acknowledgement, in seconds, and how many events it has. `guard` calls the work
    of one stream, by its name, and decides what its failure means: the other streams go on.
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
        """Move events on, and take account of delivery reports. Return whether more is likely to wait."""
        more = False
        for name, path in self._paths.items():
            more |= self._guard(name, partial(path.step, self._sink, self._now_s(), self._utc_offset_ns()))
        self.poll_reports()
        return more

    def poll_reports(self) -> None:
        """Take account of delivery reports."""
        for name, outcome in self._sink.poll().items():
            for oldest_ns, count in self._paths[name].on_reports(outcome):
                self._delivered(self._now_s() - oldest_ns / 1e9, count)

    def spill_all(self, until_s: float = float("inf")) -> None:
        """Put all that is not acknowledged into the spools, as far as these take it.

        Rings that are still filled may never be empty: of these, what there is until the clock says `until_s`.
        """
        for path in self._paths.values():
            path.spill_all(self._now_s(), self._utc_offset_ns(), lambda: self._now_s() >= until_s)
