"""Signals of the commands: handlers that take no lock, and a wait that a signal ends.

SIGINT, SIGTERM   stop in good order; the second one ends the process at once with 130
SIGHUP            `rebpf run` reads its rules again; other commands end, as when their terminal goes away
SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO   ignored: a stray one would end the process by default
SIGPIPE           ignored by Python: a write raises BrokenPipeError
SIGQUIT           the kernel's default: ends the process, for a dump
SIGWINCH, SIGCONT no effect; after SIGSTOP and SIGCONT a command continues where it was

A handler runs between any two instructions of the main thread, also inside another handler and while a lock is held. So
a handler here takes no lock: threading.Event.set in one can wait for a lock that the interrupted code holds. SIGHUP's
is a function in C, which no other handler can interrupt: however many signals come, handlers do not nest.
"""

import os
import select
import signal
from types import FrameType
from typing import Any, Protocol

QUIT_NOW = 130

_IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO)
_READ_BYTES = 4096
_INTERRUPTED = "interrupted"


class Flag(Protocol):
    """What a loop asks of a flag that a signal sets; threading.Event is one too."""

    def is_set(self) -> bool:
        """Whether it is set."""

    def set(self) -> None:
        """Set it."""

    def clear(self) -> None:
        """Clear it."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for `timeout` seconds; return whether it is set."""


class _Wakeup:
    """The descriptor that the interpreter writes a byte to for each signal, whatever thread the signal comes to."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # A full pipe is no loss: the flags say which signals came.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def wait(self, timeout_s: float | None) -> None:
        """Return when a signal has come since the last call, or after `timeout_s`."""
        if self._poll.poll(None if timeout_s is None else max(0.0, timeout_s * 1000)):
            os.read(self._reader, _READ_BYTES)


_wakeup: _Wakeup | None = None


def _listen() -> _Wakeup:
    global _wakeup
    if _wakeup is None:
        _wakeup = _Wakeup()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
    return _wakeup


class SignalFlag:
    """A flag that signals set. The main thread alone may wait for it; a wait may also end early, with any signal."""

    def __init__(self) -> None:
        self._wakeup = _listen()
        self._pending: dict[Any, Any] = {}

    def set_on(self, number: signal.Signals) -> None:
        """Have a signal set the flag, however often it comes."""
        signal.signal(number, self._pending.setdefault)

    def stop_on(self, number: signal.Signals) -> None:
        """Have a signal set the flag, and end the process at once if a signal has set it before."""
        _stops.append(self)
        signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._pending.keys() - {None}:
            os._exit(QUIT_NOW)
        self._pending[number] = True

    def interrupt_on(self, number: signal.Signals) -> None:
        """Have a signal set the flag; the second raises KeyboardInterrupt, and the third ends the process at once."""
        _stops.append(self)
        signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if _INTERRUPTED in self._pending:
            os._exit(QUIT_NOW)
        if self._pending.keys() - {None}:
            self._pending[_INTERRUPTED] = True
            raise KeyboardInterrupt
        self._pending[number] = True

    def is_set(self) -> bool:
        """Whether it is set."""
        return bool(self._pending)

    def set(self) -> None:
        """Set it."""
        self._pending[None] = True

    def clear(self) -> None:
        """Clear it."""
        self._pending.clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, any signal comes, or `timeout` seconds have passed; return whether it is set."""
        if not self._pending:
            self._wakeup.wait(timeout)
        return bool(self._pending)


_stops: list[SignalFlag] = []


def is_stopping() -> bool:
    """Whether a flag that stops this process is set."""
    return any(flag.is_set() for flag in _stops)


def set_on(number: signal.Signals) -> SignalFlag:
    """Return a flag that a signal sets."""
    flag = SignalFlag()
    flag.set_on(number)
    return flag


def stop_on_signals() -> SignalFlag:
    """Return a flag that SIGINT or SIGTERM sets; a second signal ends the process at once."""
    stop = SignalFlag()
    for number in (signal.SIGINT, signal.SIGTERM):
        stop.stop_on(number)
    return stop
