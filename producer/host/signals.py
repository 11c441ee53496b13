"""Signal handlers of the commands, without locks, and a wait that signals interrupt.

SIGINT, SIGTERM   an orderly stop; the second one terminates the process at once with 130
SIGHUP            `rebpf run` reloads its configuration, or stops if its terminal has closed; others end or stop
SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, SIGSTKFLT, real-time signals
                  ignored: by default, a stray one would terminate the process
SIGPIPE           ignored by Python: a write raises BrokenPipeError
SIGQUIT           the kernel's default: terminates the process with a core dump
SIGWINCH, SIGCONT no effect; after SIGSTOP and SIGCONT, a command continues
SIGCHLD           the kernel's default, and no signal is blocked, whatever the parent process has left

A handler runs between any two instructions of the main thread, even inside another handler or while a lock is held. So
handlers here take no lock: threading.Event.set could deadlock on a lock that the interrupted code holds. The handler of
SIGHUP is a C function, which no other handler can interrupt, so handlers do not nest, however many signals arrive.
"""

import contextlib
import errno
import os
import select
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

QUIT_NOW = 130

_IGNORED = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
    signal.SIGSTKFLT,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
_READ_BYTES = 4096
_INTERRUPTED = "interrupted"


class Flag(Protocol):
    """The interface of a flag that a signal sets; threading.Event has it, too."""

    def is_set(self) -> bool:
        """Whether it is set."""

    def set(self) -> None:
        """Set it."""

    def clear(self) -> None:
        """Clear it."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for `timeout` seconds; return whether it is set."""


class _Wakeup:
    """The descriptor to which the interpreter writes a byte per signal, whichever thread receives it."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # A full pipe loses nothing: the flags record the signals.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self.reader, select.POLLIN)

    def wait(self, timeout_s: float | None) -> None:
        """Return once a signal has arrived since the last call, or after `timeout_s`."""
        if self._poll.poll(None if timeout_s is None else max(0.0, timeout_s * 1000)):
            os.read(self.reader, _READ_BYTES)


_wakeup: _Wakeup | None = None


def _listen() -> _Wakeup:
    global _wakeup
    if _wakeup is None:
        _wakeup = _Wakeup()
    return _wakeup


class SignalFlag:
    """A flag that signals set. Only the main thread may wait for it; any signal may end a wait early."""

    def __init__(self, hangup: "Hangup | None" = None) -> None:
        self._wakeup = _listen()
        self._pending: dict[Any, Any] = {}
        self._hangup = hangup

    def stop_on(self, number: signal.Signals) -> None:
        """Let a signal set the flag, or terminate the process if a signal has set it before."""
        _stops.append(self)
        signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._pending.keys() - {None}:
            os._exit(QUIT_NOW)
        self._pending[number] = True

    def interrupt_on(self, number: signal.Signals) -> None:
        """Let a signal set the flag; the second one raises KeyboardInterrupt, and the third terminates the process."""
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
        """Whether it is set, or the terminal has closed."""
        return bool(self._pending) or (self._hangup is not None and self._hangup.is_final())

    def set(self) -> None:
        """Set it."""
        self._pending[None] = True

    def clear(self) -> None:
        """Clear it."""
        self._pending.clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, any signal arrives, or `timeout` seconds pass; return whether it is set."""
        if not self.is_set():
            self._wakeup.wait(timeout)
        return self.is_set()


class Hangup(SignalFlag):
    """A flag that SIGHUP sets to ask for a reload, unless it means that this process has lost its terminal.

    nohup has SIGHUP ignored, and a job in the background outlives its shell: for them, it always means a reload.
    """

    def __init__(self) -> None:
        super().__init__()
        self._needs_terminal = bool(hangup()) and _in_foreground()
        signal.signal(signal.SIGHUP, self._pending.setdefault)

    def is_set(self) -> bool:
        """Whether a reload is asked for."""
        return super().is_set() and not self.is_final()

    def clear(self) -> None:
        """Clear it, unless the terminal has closed in the meantime: there is one signal for that."""
        super().clear()
        if self._needs_terminal and _terminal_group() is None:
            self.set()

    def is_final(self) -> bool:
        """Whether SIGHUP has arrived, and the terminal in whose foreground this process was started has closed."""
        return self._needs_terminal and bool(self._pending) and _terminal_group() is None


def _in_foreground() -> bool:
    return _terminal_group() == os.getpgrp()


def _terminal_group() -> int | None:
    """Return the process group in the foreground of this session's terminal, 0 if unknown; None without a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return None if error.errno in (errno.ENXIO, errno.EIO) else 0
    try:
        return os.tcgetpgrp(terminal)
    except OSError:  # it closes just now
        return None
    finally:
        os.close(terminal)


_stops: list[SignalFlag] = []


def reset() -> None:
    """Ignore stray signals, and undo what the parent may have left: blocked ones, and an ignored SIGCHLD.

    Without SIGCHLD, exit codes of children are lost. SIGINT raises KeyboardInterrupt again, unless the parent ignores
    it (see producer.cli).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Let no thread that is started meanwhile take signals: they would interrupt its system calls."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def descriptor() -> int:
    """Return a descriptor that is readable once a signal has arrived, until a flag's `wait` has noticed it."""
    return _listen().reader


def hangup() -> tuple[signal.Signals, ...]:
    """Return SIGHUP, or nothing if the parent has it ignored, as nohup does."""
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


def is_stopping() -> bool:
    """Whether a flag that stops this process is set."""
    return any(flag.is_set() for flag in _stops)


def stop_on_signals(hangup: Hangup | None = None) -> SignalFlag:
    """Return a flag that SIGINT or SIGTERM sets, or the end of the terminal; a second signal terminates the process."""
    stop = SignalFlag(hangup)
    for number in (signal.SIGINT, signal.SIGTERM):
        stop.stop_on(number)
    return stop
