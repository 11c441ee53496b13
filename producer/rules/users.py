"""Looks up users that no name service knew when the rules were read, in a thread of its own.

A name service may be a directory in the network. At a boot, it may start later than the producer, and it can take
minutes to answer, while cgroups are still followed.
"""

import contextlib
import pwd
import threading
import time
from collections.abc import Callable, Sequence

_INTERVAL_S = 30.0


class Users:
    """Finds user ids by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lookup_at_s = 0.0
        self._thread: threading.Thread | None = None
        self._found: dict[str, int] = {}

    def take(self, name: str) -> int | None:
        """Return the id that the last lookup has found, once: a user can be replaced."""
        return self._found.pop(name, None)

    def look_up(self, names: Sequence[str]) -> None:
        """Start to look up users, unless a lookup runs or was started in the last 30 s.

        Raises RuntimeError if no thread can be started.
        """
        is_running = self._thread is not None and self._thread.is_alive()
        if not names or is_running or self._clock() < self._lookup_at_s:
            return
        self._lookup_at_s = self._clock() + _INTERVAL_S
        thread = threading.Thread(target=self._find, args=(names,), name="users", daemon=True)
        thread.start()
        self._thread = thread

    def _find(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(KeyError):
                self._found[name] = pwd.getpwnam(name).pw_uid
