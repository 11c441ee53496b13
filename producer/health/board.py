"""The status board: the loop publishes its status for other threads."""

import threading
import time
from collections.abc import Callable

from producer.health.status import Status


class StatusBoard:
    """Passes the loop's status to other threads.

    They call `wake` and wait at most `answer_timeout_s` for it. A loop without a step for `hangs_after_s` counts as
    hanging.
    """

    def __init__(
        self, *, hangs_after_s: float = 10.0, answer_timeout_s: float = 2.0, wake: Callable[[], None] = lambda: None
    ) -> None:
        self._hangs_after_s = hangs_after_s
        self._answer_timeout_s = answer_timeout_s
        self._wake = wake
        self._fresh = threading.Condition()
        self._requested = False
        self._status: Status | None = None
        self._number = 0
        self._stepped_at = time.monotonic()

    def step(self, status: Callable[[], Status]) -> None:
        """Record a step of the loop; publish a status if a thread waits for one."""
        self.note()
        if self._requested or self._status is None:
            self.publish(status())

    def note(self) -> None:
        """Record a step of the loop."""
        self._stepped_at = time.monotonic()

    def publish(self, status: Status) -> None:
        """Publish a status."""
        with self._fresh:
            self._status, self._requested = status, False
            self._number += 1
            self._fresh.notify_all()

    def idle_s(self) -> float:
        """Return the seconds since the loop's last step, or since this object was created."""
        return time.monotonic() - self._stepped_at

    def hang(self) -> str | None:
        """Return how long the loop has been hanging, as text; None if it is running."""
        idle_s = self.idle_s()
        return f"has made no step for {idle_s:.1f} s" if idle_s > self._hangs_after_s else None

    def last(self) -> Status | None:
        """Return the status of the loop's next step, or the last one if that takes too long; None before the first."""
        with self._fresh:
            number = self._number
            if self._status is not None:
                self._requested = True
                self._wake()
                self._fresh.wait_for(lambda: self._number > number, self._answer_timeout_s)
            return self._status
