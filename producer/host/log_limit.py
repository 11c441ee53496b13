"""Limits how often the same kind of message is logged."""

import time
from collections.abc import Callable


class LogLimit:
    """Lets each kind of message through at most once per `interval_s`.

    It remembers up to `most` kinds, because texts that change have no end; more of them within one interval are held
    back.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic, most: int = 64) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._most = most
        self._next: dict[str, float] = {}
        """When each kind may be logged again."""

    @property
    def has_logged(self) -> bool:
        """Whether any kind was logged since the last `clear`, and is remembered."""
        return bool(self._next)

    def allows(self, kind: str) -> bool:
        """Return whether to log a message of this kind now; if so, the next one has to wait."""
        now = self._clock()
        if now < self._next.get(kind, now):
            return False
        if kind not in self._next and len(self._next) >= self._most:
            self._next = {each: at for each, at in self._next.items() if now < at}
            if len(self._next) >= self._most:
                return False
        self._next[kind] = now + self._interval_s
        return True

    def forget(self, kind: str) -> None:
        """Let the next message of this kind through."""
        self._next.pop(kind, None)

    def clear(self) -> None:
        """Let the next message of every kind through."""
        self._next.clear()
