"""Exponential back-off with jitter, by tenacity, counted in the metrics."""

from tenacity import RetryCallState, Retrying, wait_random_exponential

from producer.health.metrics import retried


class BackOff:
    """The waits between retries of one operation, for a loop that does other work meanwhile.

    `what` is its name in the metrics. Waits are random, up to `first_s` at first, then doubling up to `most_s`.
    """

    def __init__(self, what: str, first_s: float = 0.5, most_s: float = 30.0) -> None:
        self._what = what
        self._wait = wait_random_exponential(multiplier=first_s, max=most_s)
        self._state = RetryCallState(Retrying(wait=self._wait), None, (), {})

    def next(self) -> float:
        """Return the seconds to wait before the next retry."""
        wait_s = self._wait(self._state)
        self._state.attempt_number += 1
        retried(self._what, wait_s)
        return wait_s

    def reset(self) -> None:
        """Start again with short waits."""
        self._state.attempt_number = 1
