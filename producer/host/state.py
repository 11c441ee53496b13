"""The state folder: facts about the running producer, and the lock against a second one.

agent.json   {"pid": ..., "brokers": "HOST:PORT", ...}: written when the producer is ready, deleted when it stops. It
             stays behind after a kill; it is valid only while the lock is held.
ledger.*     the ledger of each stream (producer.pipeline.ledger).
sequence.json  the numbers of events (producer.kernel.sequence).
status.sock  for `rebpf status`, if the endpoint requires passwords or certificates (producer.health.endpoint).
compiled/    the compiled programs (producer.kernel.program_cache).
spool/, quarantine/    events that Kafka has not taken yet, and messages that it rejected (producer.spool.spool).
lock         locked (flock) while a producer runs; the kernel releases it however the producer ends.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from producer.errors import BusyError, ConfigError, PermissionDenied, UnavailableError
from producer.host import state_file
from producer.host.text import parse_json

logger = logging.getLogger(__name__)

# Another process holds the lock for a moment when it tests it, as `is_locked` does.
LOCKING = Retrying(
    retry=retry_if_exception_type(BlockingIOError),
    wait=wait_random(0.001, 0.01),
    stop=stop_after_delay(0.5),
    reraise=True,
)

STATUS_SOCKET = "status.sock"

_RELOAD_TIMEOUT_S = 30.0
_MOST_FACTS_BYTES = 1 << 16
_FACTS: dict[str, type | tuple[type, ...]] = {
    "brokers": str,
    "registry": (str, type(None)),
    "status_url": (str, type(None)),
    "status_socket": bool,
    "rules_version": int,
    "reloads": int,
    "reload_began_ns": int,
    "reload_refused": str,
    "restart_needed": list,
}


class StateFolder:
    """The folder at `path`, created if necessary (mode 0700), and locked while entered.

    Entering raises BusyError if another producer holds the lock, ConfigError if the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._agent = path / "agent.json"
        self._published: dict[str, Any] = {}

    def publish_if_new(self, facts: dict[str, Any]) -> None:
        """Write agent.json if the facts have changed. Raises OSError; the next call retries.

        Raises UnavailableError if someone has removed or replaced the folder.
        """
        if not self._is_in_place():
            raise UnavailableError(f"state_dir {self.path} was removed or replaced: restart this producer")
        if facts != self._published:
            self.publish(facts)

    def publish(self, facts: dict[str, Any]) -> None:
        """Write agent.json atomically. Raises OSError."""
        state_file.write(self._agent, json.dumps({"pid": os.getpid(), **facts}).encode())
        self._published = facts

    def _is_in_place(self) -> bool:
        """Whether the folder at `path` is still the one that was entered. Raises OSError."""
        try:
            return os.path.samestat(os.lstat(self.path / "lock"), os.fstat(self._lock))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def __enter__(self) -> "StateFolder":
        self._lock = _open_lock(self.path)
        try:
            LOCKING(fcntl.flock, self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise BusyError(f"another producer runs with state_dir {self.path}: pid {pid(self.path)}") from error
        except OSError as error:
            os.close(self._lock)
            raise UnavailableError(_without_locks(self.path, error)) from error
        try:
            self._agent.unlink(missing_ok=True)
        except OSError:  # for example a folder
            state_file.set_aside(self._agent)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._is_in_place():  # otherwise it is another producer's
                self._agent.unlink(missing_ok=True)
        except OSError as error:  # harmless: it is valid only while the lock is held
            logger.warning("state: %s", error)
        os.close(self._lock)


def _open_lock(path: Path) -> int:
    """Open the lock of a state folder; both are created if necessary. Raises ConfigError."""
    try:
        check_owners(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EEXIST and path.is_symlink():
            raise ConfigError(f"state_dir {path}: a link to {os.readlink(path)}, which is not a folder") from error
        raise ConfigError(f"state_dir {path}: {error.strerror}") from error
    try:
        if os.geteuid() == 0:  # the folder that was opened, not the path
            _check_owner(path, os.fstat(folder).st_uid)
        return _open_file(path, os.O_CREAT, folder)
    finally:
        os.close(folder)


def _open_file(path: Path, flags: int = 0, folder: int | None = None) -> int:
    """Open the file of a lock, in the state folder `path` or in `folder`. Raises ConfigError."""
    name = path / "lock" if folder is None else "lock"
    try:
        lock = os.open(name, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        why = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"state_dir {path}: cannot open the file `lock`: {why}") from error
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise ConfigError(f"state_dir {path}: `lock` is not a regular file: remove it")
    return lock


def check_lock(path: Path) -> None:
    """Raise ConfigError if the file of the lock exists and cannot be opened."""
    if os.path.lexists(path / "lock"):
        os.close(_open_file(path))


def check_locking(folder: Path) -> None:
    """Raise UnavailableError if files in an existing folder cannot be locked."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError as error:
        raise UnavailableError(_without_locks(folder, error)) from error
    finally:
        os.close(opened)


def _without_locks(path: Path, error: OSError) -> str:
    fix = "use a local disk; NFS needs rpc.statd, and Lustre the mount option flock"
    return f"state_dir {path}: cannot be locked: {error.strerror}: {fix}"


def check_owners(path: Path) -> None:
    """Raise ConfigError if root would write to a folder where another user can create links. Raises OSError."""
    if os.geteuid() != 0:
        return
    with contextlib.suppress(FileNotFoundError):
        _check_owner(path, path.stat().st_uid)
    real = Path(os.path.realpath(path))
    above = [*reversed(path.parents), *reversed(real.parents), *([path] if path.is_symlink() else [])]
    for each in [*above, real]:
        try:
            status = each.lstat()
        except FileNotFoundError:  # root creates it later
            continue
        # In a sticky folder such as /tmp, others cannot replace root's folders, but create links among its files.
        is_safe = stat.S_ISLNK(status.st_mode) or (status.st_mode & stat.S_ISVTX and each != real)
        others = "" if is_safe else _writers(status)
        if status.st_uid != 0 or others:
            owner = f"belongs to the user with uid {status.st_uid}" if status.st_uid else f"is writable for {others}"
            fix = "set state_dir to a folder that only root can write to" if others else "run this as that user"
            raise ConfigError(f"state_dir {path}: {each} {owner}, so root does not write below it: {fix}")


def _writers(status: os.stat_result) -> str:
    """Return who may write to a folder besides its owner and root's group; empty if nobody."""
    if status.st_mode & stat.S_IWOTH:
        return "all users"
    return f"the group with gid {status.st_gid}" if status.st_mode & stat.S_IWGRP and status.st_gid else ""


def _check_owner(path: Path, owner: int) -> None:
    if owner != 0:
        raise ConfigError(f"state_dir {path}: belongs to the user with uid {owner}: run this as that user")


def is_locked(path: Path) -> bool:
    """Return whether a producer is running with this state folder. Raises PermissionDenied if this user cannot tell."""
    try:
        with open(state_file.open_regular(path / "lock"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError as error:
        why = f"state_dir {path} cannot be read by this user"
        raise PermissionDenied(f"{why}: run this as root, or as the user of the producer") from error
    except OSError:  # missing
        pass
    return False


def pid(path: Path) -> str:
    """Return the pid of the producer that uses this state folder, for messages."""
    return str((running(path) or {}).get("pid", "not ready yet"))


def running(path: Path) -> dict[str, Any] | None:
    """Return the facts published by the producer that uses this state folder; None if none is ready.

    Raises PermissionDenied if this user cannot tell.
    """
    if not is_locked(path):
        return None
    try:
        return _facts(parse_json(state_file.read(path / "agent.json", _MOST_FACTS_BYTES)))
    except (OSError, ValueError):
        return None


def _facts(value: Any) -> dict[str, Any]:
    """Check the types of facts. Raises ValueError, since others may have written the file."""
    if not isinstance(value, dict) or not state_file.is_count(value.get("pid"), 1 << 31) or value["pid"] < 2:
        raise ValueError("agent.json: expected a pid")
    if not all(isinstance(value[name], kind) for name, kind in _FACTS.items() if name in value):
        raise ValueError("agent.json: a value has the wrong type")
    return value


class Reloaded(NamedTuple):
    """A producer's answer to a reload."""

    rules_version: int
    restart_needed: tuple[str, ...]
    """Changed settings that are not in force yet."""


def reload(path: Path) -> Reloaded:
    """Let the producer that uses this state folder reload its configuration; return its answer.

    Raises ConfigError with the producer's reason if it rejects them, UnavailableError if none is running or answers.
    """
    before = running(path)
    if before is None or "reloads" not in before:
        raise UnavailableError(f"no producer is running with state_dir {path}")
    asked_ns = time.monotonic_ns()
    _signal_holder(path, before["pid"], signal.SIGHUP)
    deadline = time.monotonic() + _RELOAD_TIMEOUT_S
    while time.monotonic() < deadline:
        now = running(path)
        # A reload that had begun before may not have seen the files as they are now.
        if now is not None and now.get("reload_began_ns", 0) >= asked_ns:
            if refused := now.get("reload_refused"):
                raise ConfigError(f"the producer with pid {before['pid']} rejects the configuration: {refused}")
            return Reloaded(int(now["rules_version"]), tuple(map(str, now.get("restart_needed", ()))))
        time.sleep(0.02)
    producer = f"the producer with pid {before['pid']}"
    raise UnavailableError(f"{producer} has not reloaded within {_RELOAD_TIMEOUT_S:.0f} s: see its log")


def _signal_holder(path: Path, pid: int, number: int) -> None:
    """Signal the process that holds the lock, since agent.json could name any other. Raises UnavailableError."""
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        raise UnavailableError(f"state_dir {path}: agent.json names pid {pid}: {error.strerror}") from error
    try:
        # The pidfd was opened first, so a reuse of the pid is harmless: the signal would reach no process.
        if not _holds(pid, path / "lock"):
            raise UnavailableError(f"state_dir {path}: agent.json names pid {pid}, which does not hold the lock")
        signal.pidfd_send_signal(process, number)
    except OSError as error:
        raise UnavailableError(f"cannot signal the producer with pid {pid}: {error.strerror}") from error
    finally:
        os.close(process)


def _holds(pid: int, lock: Path) -> bool:
    """Whether the kernel lists the process as the holder of the lock. Raises OSError."""
    expected = lock.lstat()
    for line in Path("/proc/locks").read_text().splitlines():
        match line.split():  # a waiter has -> after its number
            case [_, "FLOCK", _, "WRITE", holder, file, *_] if int(holder) == pid:
                if file.split(":")[2] == str(expected.st_ino):
                    return _has_open(pid, expected)
    return False


def _has_open(pid: int, expected: os.stat_result) -> bool:
    """Whether a process has this file open, and not one with the same inode number on another disk.

    The device in /proc/locks is not that of stat() on btrfs and overlayfs.
    """
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:  # without this permission, we can only signal processes of our own user
        return True
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), expected):
                return True
    return False
