"""Times on the command line: 2026-11-29T15:00Z, or 90m for 90 minutes ago."""

import re
from datetime import UTC, datetime

from producer.errors import UsageError

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_LATEST_NS = (1 << 63) - 1
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_time(text: str, now_ns: int) -> int:
    """Return a time in nanoseconds since 1970 UTC; one without a zone is UTC. Raises UsageError.

    Times that do not fit in 63 bits are the earliest or the latest one.
    """
    return max(0, min(_parsed(text, now_ns), _LATEST_NS))


def _parsed(text: str, now_ns: int) -> int:
    if ago := _AGO.fullmatch(text.strip()):
        return now_ns - round(min(float(ago[1]), _LATEST_NS) * _SECONDS[ago[2]] * 1e9)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f"expected a time in UTC such as 2026-11-29T15:00, or 30s, 10m, 1h or 7d ago, found {text!r}"
        ) from None
    moment = moment.replace(tzinfo=moment.tzinfo or UTC)
    return int(moment.timestamp()) * 1_000_000_000 + moment.microsecond * 1000


def compact(time_ns: int | None, unlimited: str) -> str:
    """Return a time for a file name: 20261129T150000Z."""
    if time_ns is None:
        return unlimited
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y%m%dT%H%M%SZ")


def iso(time_ns: int) -> str:
    """Return a time for the command line: 2026-11-29T15:00:00Z."""
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def readable(time_ns: int) -> str:
    """Return a time for people: 2026-11-29 15:00:00 UTC."""
    return f"{datetime.fromtimestamp(time_ns // 1_000_000_000, UTC):%Y-%m-%d %H:%M:%S} UTC"
