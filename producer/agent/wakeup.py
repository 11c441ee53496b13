"""Lets the loop sleep until a ring, a signal or another thread wakes it."""

import os
import select
from collections.abc import Mapping
from typing import Self


class Wakeup:
    """Waits for rings, for signals and for other threads, while entered.

    `rings` are the descriptors of ring maps by stream, `signals` a descriptor that is readable after a signal.
    """

    def __init__(self, rings: Mapping[str, int], signals: int) -> None:
        self._streams = {descriptor: stream for stream, descriptor in rings.items()}
        self._signals = signals
        self.called = False
        """Whether another thread ended the last wait."""

    def wait(self, timeout_s: float) -> set[str]:
        """Return once there is a reason, or after `timeout_s`; return the streams whose rings woke the process."""
        ready = {descriptor for descriptor, _ in self._epoll.poll(max(0.0, timeout_s))}
        self.called = self._event in ready
        if self.called:
            os.eventfd_read(self._event)
        return {self._streams[descriptor] for descriptor in ready & self._streams.keys()}

    def call(self) -> None:
        """Wake the loop from another thread."""
        os.eventfd_write(self._event, 1)

    def __enter__(self) -> Self:
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._event, select.EPOLLIN)
        self._epoll.register(self._signals, select.EPOLLIN)
        for descriptor in self._streams:
            # By edges, that is when the kernel wakes: events that were read but not committed keep a ring readable.
            self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)
        return self

    def __exit__(self, *_: object) -> None:
        # The eventfd stays open: another thread may still call, and must not write to a file that got its number.
        self._epoll.close()
