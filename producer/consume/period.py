"""A period of event time: the same in every view of the past."""

from dataclasses import dataclass

import numpy as np

from producer.errors import UsageError
from producer.events import Ints, Mask


@dataclass(frozen=True, slots=True)
class Period:
    """A time span in nanoseconds since 1970 UTC, end excluded; None is unlimited. Raises UsageError if it is empty."""

    since_ns: int | None = None
    until_ns: int | None = None

    def __post_init__(self) -> None:
        if self.since_ns is not None and self.until_ns is not None and self.since_ns >= self.until_ns:
            raise UsageError("the period is empty: --since must be before --until")

    def mask(self, ts_ns: Ints) -> Mask:
        """Return a mask of the times that are in it."""
        chosen = np.ones(len(ts_ns), np.bool_)
        if self.since_ns is not None:
            chosen &= ts_ns >= self.since_ns
        if self.until_ns is not None:
            chosen &= ts_ns < self.until_ns
        return chosen


ALWAYS = Period()
