"""The files of a spool's folder: their names, their sizes, and when they were begun."""

import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from producer.host import state_file
from producer.host.clock import Moment

SPOOL_SUFFIX, ASIDE_SUFFIX = ".avro", ".damaged"
"""What names of files end with: files, and what was set aside because of damage."""
_STEM = re.compile(r"[0-9]{20}")
_MOST_NUMBER = 1 << 62
"""No event's number comes near it."""


def files(folder: Path, ending: str) -> list[Path]:
    """Return a spool's files whose names end so, in the order of their events; none where there is no folder.

    A name that no event can have given is somebody else's.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ending and _is_ours(path.stem))
    except FileNotFoundError:
        return []


def made_at(metadata: Mapping[str, str]) -> Moment | None:
    """Return when a file was begun, by its header's metadata; None where these do not say."""
    try:
        made = Moment(**state_file.parse(metadata["rebpf.made"]))
    except (ValueError, TypeError, KeyError):
        return None
    times = made.boottime_s, made.time_s
    is_moment = isinstance(made.boot_id, str) and all(type(time) in (int, float) and _is_time(time) for time in times)
    return made if is_moment else None


def _is_time(seconds: float) -> bool:
    return abs(seconds) < 1 << 40 and math.isfinite(seconds)


def _is_ours(stem: str) -> bool:
    return _STEM.fullmatch(stem) is not None and int(stem) < _MOST_NUMBER


def size_bytes(path: Path) -> int:
    """Return a regular file's size; 0 of anything else, which takes no room that could be won back."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
