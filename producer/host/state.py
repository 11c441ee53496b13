"""The state folder: who runs here, for others to find, and the lock that keeps a second producer out.

agent.json   {"pid": ..., "brokers": "HOST:PORT", ...}: written when the producer is ready, removed when it stops. A
             producer that was killed leaves it behind; it counts only while its lock is held.
ledger.*     each stream's account (producer.pipeline.ledger).
sequence.json  the numbers of events (producer.kernel.sequence).
status.sock  by which `rebpf status` asks, where the endpoint has passwords or certificates (producer.health.endpoint).
compiled/    the programs as they were compiled (producer.kernel.program_cache).
spool/, quarantine/    events that wait for Kafka, and messages that it has refused (producer.spool.spool).
lock         locked (flock) while a producer runs; the kernel lets go of it however the producer ends.
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
from types import TracebackType
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from producer.errors import BusyError, ConfigError, UnavailableError
from producer.host import state_file

logger = logging.getLogger(__name__)

# Who asks whether a producer runs holds the lock for a moment.
_LOCKING = Retrying(
    retry=retry_if_exception_type(BlockingIOError),
    wait=wait_random(0.001, 0.01),
    stop=stop_after_delay(0.5),
    reraise=True,
)

STATUS_SOCKET = "status.sock"

_RELOAD_TIMEOUT_S = 10.0
_MOST_FACTS_BYTES = 1 << 16
_FACTS: dict[str, type | tuple[type, ...]] = {
    "brokers": str,
    "registry": (str, type(None)),
    "status_url": (str, type(None)),
    "status_socket": bool,
    "rules_version": int,
    "reloads": int,
    "reload_refused": str,
}


class StateFolder:
    """The folder at `path`, made if need be (mode 0700), and locked while this object is entered.

    Entering raises BusyError where another producer holds the lock, ConfigError where the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._agent = path / "agent.json"
        self._published: dict[str, Any] = {}

    def publish_if_new(self, facts: dict[str, Any]) -> None:
        """Write agent.json where the facts are others than those in it. OSError where that fails: try again."""
        if facts != self._published:
            self.publish(facts)

    def publish(self, facts: dict[str, Any]) -> None:
        """Write agent.json, whole or not at all. Raises OSError."""
        fresh = self._agent.with_suffix(".new")
        with open(state_file.create(fresh), "w") as file:
            file.write(json.dumps({"pid": os.getpid(), **facts}))
        fresh.replace(self._agent)
        self._published = facts

    def __enter__(self) -> "StateFolder":
        self._lock = _open_lock(self.path)
        try:
            _LOCKING(fcntl.flock, self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise BusyError(f"another producer runs with state_dir {self.path}: pid {pid(self.path)}") from error
        try:
            self._agent.unlink(missing_ok=True)
        except OSError:  # a folder, say
            state_file.set_aside(self._agent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._agent.unlink(missing_ok=True)
        except OSError as error:  # it counts only as long as the lock is held
            logger.warning("state: %s", error)
        os.close(self._lock)


def _open_lock(path: Path) -> int:
    """Open the lock of a state folder, which is made if need be. Raises ConfigError where either cannot be used."""
    try:
        check_owners(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EEXIST and path.is_symlink():
            raise ConfigError(f"state_dir {path}: a link to {os.readlink(path)}, which is no folder") from error
        raise ConfigError(f"state_dir {path}: {error.strerror}") from error
    try:
        if os.geteuid() == 0:  # the very folder that was opened
            _check_owner(path, os.fstat(folder).st_uid)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open("lock", flags, 0o600, dir_fd=folder)
    except OSError as error:
        why = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"state_dir {path}: cannot open the file lock in it: {why}") from error
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise ConfigError(f"state_dir {path}: lock is not a regular file: remove it")
    return lock


def check_owners(path: Path) -> None:
    """Raise ConfigError where root would write where another user could put links; OSError."""
    if os.geteuid() != 0:
        return
    with contextlib.suppress(FileNotFoundError):
        _check_owner(path, path.stat().st_uid)
    above = [*reversed(path.parents), *reversed(Path(os.path.realpath(path)).parents)]
    for each in [*above, *([path] if path.is_symlink() else [])]:
        try:
            status = each.lstat()
        except FileNotFoundError:  # made later, by root
            continue
        others = (
            status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX and not stat.S_ISLNK(status.st_mode)
        )
        if status.st_uid != 0 or others:
            whose = f"belongs to the user with uid {status.st_uid}" if status.st_uid else "can be written by all users"
            fix = "set state_dir to a folder below root's own" if others else "run this as that user"
            raise ConfigError(f"state_dir {path}: {each} {whose}, so root does not write below it: {fix}")


def _check_owner(path: Path, owner: int) -> None:
    if owner != 0:
        raise ConfigError(f"state_dir {path}: belongs to the user with uid {owner}: run this as that user")


def is_locked(path: Path) -> bool:
    """Say whether a producer has this state folder."""
    try:
        with open(state_file.open_regular(path / "lock"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no folder, no file, or not ours to read
        pass
    return False


def pid(path: Path) -> str:
    """Return the pid of the producer that has this state folder, for a message."""
    return str((running(path) or {}).get("pid", "not ready yet"))


def running(path: Path) -> dict[str, Any] | None:
    """Return what the producer that runs with this state folder has published; None where none is ready."""
    if not is_locked(path):
        return None
    try:
        return _facts(state_file.parse(state_file.read(path / "agent.json", _MOST_FACTS_BYTES)))
    except (OSError, ValueError):
        return None


def _facts(value: Any) -> dict[str, Any]:
    """Return facts whose types are right. Raises ValueError for all else: others may have written the file."""
    if not isinstance(value, dict) or not state_file.is_count(value.get("pid"), 1 << 31) or value["pid"] < 2:
        raise ValueError("agent.json names no pid")
    if not all(isinstance(value[name], kind) for name, kind in _FACTS.items() if name in value):
        raise ValueError("agent.json has a value of another type")
    return value


def reload(path: Path) -> int:
    """Have the producer that runs with this state folder read its rules anew; return the version that is then in force.

    ConfigError with the producer's reason where it refuses them, UnavailableError where none runs or answers.
    """
    before = running(path)
    if before is None or "reloads" not in before:
        raise UnavailableError(f"no producer runs with state_dir {path}")
    _signal_holder(path, before["pid"], signal.SIGHUP)
    deadline = time.monotonic() + _RELOAD_TIMEOUT_S
    while time.monotonic() < deadline:
        now = running(path)
        if now is not None and now.get("reloads", 0) > before["reloads"]:
            if refused := now.get("reload_refused"):
                raise ConfigError(f"the producer with pid {before['pid']} refuses the rules: {refused}")
            return int(now["rules_version"])
        time.sleep(0.02)
    who = f"the producer with pid {before['pid']}"
    raise UnavailableError(f"{who} does not answer the reload within {_RELOAD_TIMEOUT_S:.0f} s: see its log")


def _signal_holder(path: Path, pid: int, number: int) -> None:
    """Signal a process that holds the lock, and no other: agent.json may name any. Raises UnavailableError."""
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        raise UnavailableError(f"state_dir {path}: agent.json names pid {pid}: {error.strerror}") from error
    try:
        # The descriptor comes first: were the pid another process's by now, the signal would reach nobody.
        if not _holds(pid, path / "lock"):
            raise UnavailableError(f"state_dir {path}: agent.json names pid {pid}, which does not hold the lock")
        signal.pidfd_send_signal(process, number)
    except OSError as error:
        raise UnavailableError(f"cannot signal the producer with pid {pid}: {error.strerror}") from error
    finally:
        os.close(process)


def _holds(pid: int, lock: Path) -> bool:
    """Whether the kernel has a process down as a lock's holder. Raises OSError."""
    wanted = lock.lstat()
    for line in Path("/proc/locks").read_text().splitlines():
        match line.split():  # one that waits has -> after its number
            case [_, "FLOCK", _, "WRITE", holder, place, *_] if int(holder) == pid:
                if place.split(":")[2] == str(wanted.st_ino):
                    return _has_open(pid, wanted)
    return False


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    """Whether a process has this very file open, and not one with the same number on another disk.

    The device in /proc/locks is not that of stat() on btrfs and overlayfs.
    """
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:  # who may not look may signal no more than the user's own processes
        return True
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                return True
    return False
