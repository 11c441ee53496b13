"""Waits between tries of what may work later: exponential with jitter, by tenacity, and counted."""

from tenacity import RetryCallState, Retrying, wait_random_exponential

from producer.health.metrics import retried


class BackOff:
    """The waits of one thing that is tried again and again, by a loop that does other things in between.

    `what` names it in the metrics. Waits are random, up to `first_s` for the first, twice that for each that follows,
    and `most_s` at most.
    """

    def __init__(self, what: str, first_s: float = 0.5, most_s: float = 30.0) -> None:
        self._what = what
        self._wait = wait_random_exponential(multiplier=first_s, max=most_s)
        self._state = RetryCallState(Retrying(wait=self._wait), None, (), {})

    def next(self) -> float:
        """Return the seconds to wait before the next try."""
        wait_s = self._wait(self._state)
        self._state.attempt_number += 1
        retried(self._what, wait_s)
        return wait_s

    def reset(self) -> None:
        """Begin with short waits again."""
        self._state.attempt_number = 1
