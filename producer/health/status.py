"""The producer's status: the same for heartbeats, metrics and `rebpf status`."""

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from producer.errors import UnavailableError
from producer.events import Topic
from producer.health.balance import Balance, stage
from producer.host.text import lines

_STATM_BYTES = 256


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """One stream: its balance, and the use of its ring and spool."""

    topic: Topic
    hook: str
    balance: Balance
    ring_bytes: int
    ring_used_bytes: int
    spool_bytes: int
    spool_max_bytes: int
    """0 without a spool. Not in the heartbeat."""

    def as_dict(self) -> dict[str, Any]:
        """Return the stream for JSON output and for the heartbeat's schema."""
        lost = [{"stage": stage(reason), "reason": reason, "count": n} for reason, n in self.balance.lost.items()]
        return {
            "topic": self.topic,
            "hook": self.hook,
            **self.balance.as_dict(),
            "lost": lost,
            "ring_bytes": self.ring_bytes,
            "ring_used_bytes": self.ring_used_bytes,
            "spool_bytes": self.spool_bytes,
        }


@dataclass(frozen=True, slots=True)
class Status:
    """The producer as a whole. It is degraded if there are `reasons`, which are for the operator."""

    host: str
    boot_id: str
    version: str
    pid: int
    started_s: float
    """Seconds since 1970 UTC."""
    rules_version: int
    streams: tuple[StreamStatus, ...]
    reasons: tuple[str, ...]
    cpu_s: float
    rss_bytes: int
    labels: Mapping[str, str]
    """Labels of the site."""
    transmit_sample_rate: int = 1
    """The rate at which the budget for transmits samples connections."""
    stopped: bool = False
    """Whether this is the last status of a run that stopped cleanly."""
    config_hash: str = ""
    """Hash of the configuration in force (producer.config.effective.digest)."""
    restart_needed: tuple[str, ...] = ()
    """Settings that have changed in the files and need a restart."""

    @property
    def state(self) -> str:
        """ok, degraded or stopped."""
        return "stopped" if self.stopped else "degraded" if self.reasons else "ok"

    def as_dict(self) -> dict[str, Any]:
        """Return the status for JSON output and, except for the times, for the heartbeat's schema."""
        return {
            "state": self.state,
            "reasons": list(self.reasons),
            "host": self.host,
            "boot_id": self.boot_id,
            "version": self.version,
            "pid": self.pid,
            "started_s": self.started_s,
            "rules_version": self.rules_version,
            "config_hash": self.config_hash,
            "restart_needed": list(self.restart_needed),
            "cpu_s": self.cpu_s,
            "rss_bytes": self.rss_bytes,
            "transmit_sample_rate": self.transmit_sample_rate,
            "streams": [stream.as_dict() for stream in self.streams],
            "labels": dict(self.labels),
        }


def usage() -> tuple[float, int]:
    """Return this process's CPU seconds so far, of all threads, and its resident bytes."""
    resident_pages = int(os.pread(_statm(), _STATM_BYTES, 0).split()[1])
    return time.process_time(), resident_pages * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _statm() -> int:
    """Return a descriptor of the file with this process's memory: later there may be none free to open it."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def summary(status: Status) -> str:
    """Return a status as one line."""
    streams = "; ".join(f"{stream.topic} {stream.hook} {stream.balance}" for stream in status.streams)
    return f"{status.state}{' (' + ', '.join(status.reasons) + ')' if status.reasons else ''}: {streams}"


_COUNTS = ("passed", "delivered", "in_flight", "spooled", "in_ring")


def table(report: Mapping[str, Any]) -> str:
    """Format the result of `Status.as_dict`: the state and its reasons, one column per topic, and losses.

    Raises UnavailableError if `report` is not a status, because something else answers at the address.
    """
    try:
        return _table(report)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UnavailableError(f"expected the status of a producer, found something else: {error!r}") from error


def _table(report: Mapping[str, Any]) -> str:
    # Producers of earlier versions have neither a hash nor labels.
    facts = " ".join(f"{name}={report[name]}" for name in ("host", "version", "pid", "rules_version"))
    config = f" config={report['config_hash']}" if report.get("config_hash") else ""
    labels = " ".join(f"{name}={value}" for name, value in report.get("labels", {}).items())
    columns = [("topic", "hook", *_COUNTS, "lost", "ring", "spool"), *map(_column, report["streams"])]
    widths = [max(map(len, column)) for column in columns]
    return lines(
        [
            report["state"],
            *(f"  {reason}" for reason in report["reasons"]),
            *(f"  needs a restart: {setting}" for setting in report.get("restart_needed", ())),
            f"{facts}{config} cpu={report['cpu_s']:.1f}s rss={_mebibytes(report['rss_bytes'])}",
            *([f"labels {labels}"] if labels else []),
            *("  ".join(map(str.rjust, row, widths)) for row in zip(*columns, strict=True)),
            *(
                f"lost topic={stream['topic']} stage={loss['stage']} reason={loss['reason']} count={loss['count']}"
                for stream in report["streams"]
                for loss in stream["lost"]
            ),
        ]
    )


def _column(stream: Mapping[str, Any]) -> tuple[str, ...]:
    lost = sum(loss["count"] for loss in stream["lost"])
    return (
        stream["topic"],
        stream["hook"],
        *(str(stream[name]) for name in _COUNTS),
        str(lost),
        f"{stream['ring_used_bytes'] / stream['ring_bytes']:.0%}",
        _mebibytes(stream["spool_bytes"]),
    )


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f}MiB"
