"""The files in a spool's folder: their names, sizes and creation times."""

import logging
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from producer.host import state_file
from producer.host.clock import Moment
from producer.host.text import parse_json
from producer.spool.disk import ABOUT_THE_FILE

logger = logging.getLogger(__name__)

SPOOL_SUFFIX, ASIDE_SUFFIX = ".avro", ".damaged"
"""Suffixes of spool files, and of damaged files kept for inspection."""
_STEM = re.compile(r"[0-9]{20}")
_MOST_NUMBER = 1 << 62
"""Far above any event's number."""
_MOST_SECONDS = 1 << 40


@dataclass(slots=True)
class SpoolFile:
    """A file of events from number `base` on."""

    base: int
    end: int
    """Number after the last event, damaged or not."""
    path: Path
    size: int
    made: Moment
    damaged: bool = False


def make_folder(folder: Path) -> None:
    """Create a spool's folder and the one that it is in (mode 0700); rename a file or dangling link in their place."""
    for each in (folder.parent, folder):
        try:
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            if (aside := state_file.set_aside(each)) is None:
                raise
            logger.error("spool: %s is not a folder, renamed to %s", each, aside.name)
            each.mkdir(mode=0o700)


def files(folder: Path, ending: str) -> list[Path]:
    """Return a spool's files with this suffix, in the order of their events; none if the path is not a folder.

    Files whose names are not event numbers are not ours and are left out.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ending and _is_ours(path.stem))
    except OSError as error:
        if error.errno not in ABOUT_THE_FILE:
            raise
        return []


def made_at(metadata: Mapping[str, str]) -> Moment | None:
    """Return a file's creation time from its header's metadata; None if it is missing or invalid."""
    try:
        made = Moment(**parse_json(metadata["rebpf.made"]))
    except (ValueError, TypeError, KeyError):
        return None
    times = made.boottime_s, made.time_s
    # Not a number and infinity are not in the range either.
    are_times = all(type(time) in (int, float) and -_MOST_SECONDS < time < _MOST_SECONDS for time in times)
    return made if are_times and isinstance(made.boot_id, str) else None


def _is_ours(stem: str) -> bool:
    return _STEM.fullmatch(stem) is not None and int(stem) < _MOST_NUMBER


def size_bytes(path: Path) -> int:
    """Return a regular file's size; 0 for anything else, since deleting it would free no space."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
