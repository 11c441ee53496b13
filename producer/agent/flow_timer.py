"""When open connections are reported: once in each interval, in small steps, so that no step delays the loop."""

import zlib
from collections.abc import Callable, Generator

_MOST_FILL = 0.5


class FlowTimer:
    """Runs `report`, a generator, once every `interval_s`, one step at a time, from `now_s` on.

    The first report comes after a part of the interval that depends on the host's name, so that the hosts of a fleet
    that start together do not report together. While the ring is more than half full (`fill`), no step is taken, since
    the rest is for the records of closed connections.
    """

    def __init__(
        self,
        report: Callable[[], Generator[None]],
        fill: Callable[[], float],
        interval_s: float,
        host: str,
        now_s: float,
    ) -> None:
        self._report = report
        self._fill = fill
        self._interval_s = interval_s
        self._next_s = now_s + interval_s * zlib.crc32(host.encode()) / (1 << 32)
        self._steps: Generator[None] | None = None

    @property
    def due_s(self) -> float:
        """When to call `step`; in the past while a report is under way."""
        return self._next_s if self._steps is None else 0.0

    def set_interval(self, interval_s: float) -> None:
        """Report this long after the last report, and from then on at this interval."""
        self._next_s += interval_s - self._interval_s
        self._interval_s = interval_s

    def step(self, now_s: float) -> None:
        """Take the next step. An error ends this interval's report."""
        if self._steps is None:
            self._steps = self._report()
            self._next_s += self._interval_s * (1 + (now_s - self._next_s) // self._interval_s)
        if self._fill() > _MOST_FILL:
            return
        steps, self._steps = self._steps, None
        for _ in steps:  # ends without a turn once the report is complete
            self._steps = steps
            return

    def close(self) -> None:
        """End the report. The next step begins another one."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
