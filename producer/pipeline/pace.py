"""When to read each ring, so that cost follows load. The time is passed in.

A read that finds events costs a batch and a produce request. So a ring is read once its events nearly fill a request,
by the rate at the last read, and `latency_s` after the last read at the latest. If events come faster than expected, it
is read when unread events fill a quarter of it: the kernel wakes the process often enough to see that
(bpf/rebpf.bpf.c). Otherwise a ring is not read while events from it are in flight (producer/pipeline/pipeline.py).

Retransmissions are urgent, unless the configuration says otherwise: their ring also wakes the process when it was
empty, and is read at once, but at most every 20 ms and within a budget of reads that grows with the host's events, so
that they cost a quiet host few requests.
"""

LEAST_S = 0.02
"""Seconds between two reads of a ring, unless it fills."""
_RETRY_S = 0.1
_REQUEST_SHARE = 0.8
"""Of the events that fit into a produce request: what a read waits for, as more may come meanwhile."""
_FILLING = 0.25
_BURST = 10.0
_LEAST_READS_PER_S = 2.5
_EVENTS_PER_READ = 100.0
_RATE_S = 1.0


class Budget:
    """Limits reads of urgent events: 2.5 a second, or one per 100 events of the host if that is more; bursts of 10."""

    def __init__(self) -> None:
        self._left = _BURST
        self._at_s = 0.0
        self._rates: dict[str, float] = {}

    def set_rate(self, stream: str, events_per_s: float) -> None:
        """Note the rate of a stream."""
        self._rates[stream] = events_per_s

    def spend(self, now_s: float) -> None:
        """Take a read from the budget, even if none is left."""
        self._refill(now_s)
        self._left -= 1

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until a read is left."""
        self._refill(now_s)
        return max(0.0, 1 - self._left) / self._reads_per_s

    @property
    def _reads_per_s(self) -> float:
        return max(_LEAST_READS_PER_S, sum(self._rates.values()) / _EVENTS_PER_READ)

    def _refill(self, now_s: float) -> None:
        self._left = min(_BURST, self._left + (now_s - self._at_s) * self._reads_per_s)
        self._at_s = now_s


class StreamPace:
    """Decides when a stream's ring is read next: at `due_s`, on the same clock as the times that are passed in."""

    def __init__(self, stream: str, latency_s: float, budget: Budget, *, is_urgent: bool) -> None:
        self._stream = stream
        self.latency_s = latency_s
        self._budget = budget
        self.is_urgent = is_urgent
        self.due_s = 0.0
        self._rows = 0
        """Rows since `_read_s`, when the ring was last read to its end."""
        self._read_s = 0.0
        self._was_empty = False
        self._counted, self._counted_s = 0, 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether to read the ring in a turn at this time.

        One that was empty is read up to half of its wait early, so that idle rings share their turns.
        """
        return now_s >= (0.5 * (self._read_s + self.due_s) if self._was_empty else self.due_s)

    def after_read(self, now_s: float, rows: int, request_rows: int, *, more: bool) -> None:
        """Note a read of `rows`; `request_rows` fit into a produce request. `more`: the ring likely has more."""
        self._measure(now_s, rows)
        self._rows += rows
        if more:
            self.due_s = now_s
            return
        elapsed_s = now_s - self._read_s
        wait_s = self.latency_s
        if self._rows and self.is_urgent:
            self._budget.spend(now_s)
            wait_s = max(LEAST_S, self._budget.wait_s(now_s))
        elif self._rows:
            wait_s = max(LEAST_S, _REQUEST_SHARE * request_rows * elapsed_s / self._rows)
        self.due_s = now_s + min(wait_s, self.latency_s)
        self._was_empty = not self._rows
        self._rows, self._read_s = 0, now_s

    def after_failure(self, now_s: float) -> None:
        """Note a read that failed."""
        self.due_s = now_s + _RETRY_S
        self._was_empty = False

    def heeds(self, unread_share: float) -> bool:
        """Whether a wake-up changes when the ring is read, if unread events use this share of it."""
        return self.is_urgent or unread_share >= _FILLING

    def wake(self, now_s: float, unread_share: float) -> None:
        """Note that the ring woke the process or may have missed a reason to."""
        if unread_share >= _FILLING:
            self.due_s = now_s
        elif self.is_urgent:
            at_s = max(now_s + self._budget.wait_s(now_s), self._read_s + LEAST_S)
            self.due_s = min(self.due_s, at_s)

    def _measure(self, now_s: float, rows: int) -> None:
        self._counted += rows
        if (elapsed_s := now_s - self._counted_s) >= _RATE_S:
            self._budget.set_rate(self._stream, self._counted / elapsed_s)
            self._counted, self._counted_s = 0, now_s
