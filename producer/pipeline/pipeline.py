"""Moves the events of all streams: read rows from the ring, encode them, send them to Kafka or spill them to disk, and
free the ring's space once they are safe.

The ring is the log: the kernel gets a batch's space back only when every message of it and of all batches before it is
acknowledged or rejected for good, or when the batch is in the spool. So undelivered events have one order: first the
spool, then the ring. The oldest of them are in flight. While Kafka accepts messages, the spool is empty and nothing is
written to disk. When Kafka does not, the batches in flight are spilled, then the new ones; new events are sent after
the spooled ones until the spool is empty. If the spool fails too (a full disk), events stay in the ring, and when the
ring is full, the kernel counts what it cannot store. Nothing else is buffered, and nothing blocks.

One thread calls `turn` in a loop, and `pace` decides what is due. Files and clocks are reached only through the objects
passed in.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

from producer.events import RETRANSMITS
from producer.pipeline.interfaces import Sink
from producer.pipeline.pace import LEAST_S, Budget, StreamPace
from producer.pipeline.stream import StreamPipeline

logger = logging.getLogger(__name__)

_MOST_REPORT_WAIT_S = 0.1


class Pipeline:
    """Moves the events of all `streams` to `sink`, each within about `latency_s`, and retransmissions `at_once`.

    `now_s` returns the monotonic clock in seconds, `utc_offset_ns` its offset to UTC. `delivered` is called per batch
    with the seconds from the kernel to the acknowledgement, and its number of events. `guard` runs the work of one
    stream, by its name, and handles its failures, so that the other streams continue; it returns None for a failure.
    """

    def __init__(
        self,
        streams: Sequence[StreamPipeline],
        sink: Sink,
        now_s: Callable[[], float],
        utc_offset_ns: Callable[[], int],
        delivered: Callable[[float, int], None] = lambda seconds, count: None,
        guard: Callable[[str, Callable[[], bool]], bool | None] = lambda stream, work: work(),
        latency_s: float = 1.0,
        *,
        at_once: bool = True,
    ) -> None:
        self._streams = {each.stream.name: each for each in streams}
        self._sink = sink
        self._now_s = now_s
        self._utc_offset_ns = utc_offset_ns
        self._delivered = delivered
        self._guard = guard
        budget = Budget()
        self._paces = {
            each.stream.name: StreamPace(each.stream.name, latency_s, budget, is_urgent=False) for each in streams
        }
        self.set_latency(latency_s, at_once=at_once)

    def set_latency(self, latency_s: float, *, at_once: bool) -> None:
        """Read each ring within about `latency_s` from its next read on, and retransmissions `at_once`."""
        for name, pace in self._paces.items():
            pace.latency_s, pace.is_urgent = latency_s, at_once and name == RETRANSMITS.name

    def heeds(self, woken: Collection[str]) -> bool:
        """Whether the next turn should come early because the rings of these streams woke the process."""
        return any(self._paces[name].heeds(self._streams[name].unread_share) for name in woken)

    def turn(self, woken: Collection[str] = ()) -> float:
        """Process delivery reports and move the events that are due; return the seconds until the next turn.

        `woken` are the streams whose rings woke the process.
        """
        finished = self.poll_reports()
        for name, stream in self._streams.items():
            pace, now_s = self._paces[name], self._now_s()
            # The kernel wakes nobody for an event that arrives before all older ones were committed.
            if name in woken or (pace.is_urgent and name in finished and stream.unread_share):
                pace.wake(now_s, stream.unread_share)
            is_stalled = stream.is_stalled(self._sink, now_s)
            if is_stalled or (pace.is_due(now_s) and not self._waits(name)):
                taken = stream.taken
                more = self._step(name, stream) if is_stalled or stream.unread_share else False
                if more is None:
                    pace.after_failure(now_s)
                else:
                    pace.after_read(now_s, stream.taken - taken, stream.request_rows, more=more)
        now_s = self._now_s()
        dues = [pace.due_s - now_s for name, pace in self._paces.items() if not self._waits(name)]
        return min(dues + self._report_waits(now_s))

    def _waits(self, name: str) -> bool:
        """Whether a stream's events stay in its ring until those in flight are acknowledged.

        librdkafka has one request in flight per partition anyway, and polls without a pause while more messages wait.
        """
        stream, pace = self._streams[name], self._paces[name]
        return not pace.is_urgent and stream.oldest_sent_s is not None and not pace.heeds(stream.unread_share)

    def _report_waits(self, now_s: float) -> list[float]:
        """Return when to look for each stream's next delivery reports: the longer they take, the later.

        Unless the stream is urgent or stalled, they change nothing before its ring is due.
        """
        waits = []
        for name, stream in self._streams.items():
            if (sent_s := stream.oldest_sent_s) is not None:
                pace, wait_s = self._paces[name], max(LEAST_S, now_s - sent_s)
                if not pace.is_urgent and not stream.is_stalled(self._sink, now_s):
                    wait_s = max(wait_s, pace.due_s - now_s)
                waits.append(min(wait_s, _MOST_REPORT_WAIT_S))
        return waits

    def step(self) -> bool:
        """Move events of each stream, and process delivery reports; return whether there are likely more events."""
        more = [self._step(name, stream) for name, stream in self._streams.items()]
        self.poll_reports()
        return any(more)

    def _step(self, name: str, stream: StreamPipeline) -> bool | None:
        return self._guard(name, partial(stream.step, self._sink, self._now_s(), self._utc_offset_ns()))

    def poll_reports(self) -> set[str]:
        """Process delivery reports; return the streams that have any."""
        outcomes = self._sink.poll()
        finished = self._streams.keys() & outcomes.keys()  # the sink may carry more than these streams
        failures = []
        for name in finished:
            try:
                for oldest_ns, count in self._streams[name].on_reports(outcomes[name]):
                    self._delivered(self._now_s() - oldest_ns / 1e9, count)
            except Exception as failure:  # the sink has forgotten the outcomes of the other streams, too
                failures.append(failure)
        if failures:
            raise failures[0]
        return finished

    def spill_all(self, until_s: float = float("inf")) -> None:
        """Spill all unacknowledged events, as far as the spools take them.

        A ring that is still being filled may never be empty, so this ends when the clock reaches `until_s`.
        """
        for name, stream in self._streams.items():
            try:
                stream.spill_all(self._now_s(), self._utc_offset_ns(), lambda: self._now_s() >= until_s)
            except Exception:  # what is left counts as lost, and the others go on
                logger.exception("stop: cannot move events to disk stream=%s", name)
