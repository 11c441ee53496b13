"""The state folder: who runs here, for others to find, and the lock that keeps a second producer out.

agent.json   {"pid": ..., "brokers": "HOST:PORT", ...}: written when the producer is ready, removed when it stops. A
             producer that was killed leaves it behind; it counts only while its lock is held.
ledger.*     each stream's account (producer.ledger); sequence.json: the numbers of events (producer.sequence).
compiled/    the programs as they were compiled (producer.compiled).
spool/, quarantine/    events that wait for Kafka, and messages that it has refused (producer.spool).
lock         locked (flock) while a producer runs; the kernel lets go of it however the producer ends.
"""

import fcntl
import json
import logging
import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from producer.errors import BusyError, ConfigError, UnavailableError

logger = logging.getLogger(__name__)

# Who asks whether a producer runs holds the lock for a moment.
_LOCKING = Retrying(
    retry=retry_if_exception_type(BlockingIOError),
    wait=wait_random(0.001, 0.01),
    stop=stop_after_delay(0.5),
    reraise=True,
)

_RELOAD_TIMEOUT_S = 10.0


class StateFolder:
    """The folder at `path`, made if need be (mode 0700), and locked while this object is entered.

    Entering raises BusyError where another producer holds the lock, ConfigError where the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._agent = path / "agent.json"
        self._published: dict[str, Any] = {}

    def publish_if_new(self, facts: dict[str, Any]) -> None:
        """Write agent.json where the facts are others than before."""
        if facts != self._published:
            self.publish(facts)

    def publish(self, facts: dict[str, Any]) -> None:
        """Write agent.json, whole or not at all."""
        self._published = facts
        fresh = self._agent.with_suffix(".new")
        try:
            fresh.write_text(json.dumps({"pid": os.getpid(), **facts}))
            fresh.replace(self._agent)
        except OSError as error:  # a full disk keeps nobody from capturing
            logger.warning("state: %s: others cannot find this producer", error)

    def __enter__(self) -> "StateFolder":
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"state_dir {self.path}: {error.strerror}") from error
        try:
            _LOCKING(fcntl.flock, self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise BusyError(f"another producer runs with state_dir {self.path}: pid {pid(self.path)}") from error
        self._agent.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._agent.unlink(missing_ok=True)
        except OSError as error:  # it counts only as long as the lock is held
            logger.warning("state: %s", error)
        os.close(self._lock)


def is_locked(path: Path) -> bool:
    """Say whether a producer has this state folder."""
    try:
        with open(path / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no folder, or not ours to read
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
        facts: dict[str, Any] = json.loads((path / "agent.json").read_text())
    except (OSError, ValueError):
        return None
    return facts


def reload(path: Path) -> int:
    """Have the producer that runs with this state folder read its rules anew; return the version that is then in force.

    UnavailableError where none runs, or where it has refused the rules or does not answer: its log says why.
    """
    before = running(path)
    if before is None:
        raise UnavailableError(f"no producer runs with state_dir {path}")
    os.kill(before["pid"], signal.SIGHUP)
    deadline = time.monotonic() + _RELOAD_TIMEOUT_S
    while time.monotonic() < deadline:
        now = running(path)
        if now is not None and now["rules_version"] > before["rules_version"]:
            return int(now["rules_version"])
        time.sleep(0.02)
    raise UnavailableError(f"the producer with pid {before['pid']} has not taken the rules: its log says why")
