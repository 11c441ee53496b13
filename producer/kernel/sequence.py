"""Where the numbers of events (cpu_seq) begin, so that none is given twice within a boot: a small file says what was.

sequence.json   {"boot_id": ..., "generation": G, "last": {stream: [number by CPU]}, "crc32": ...}: `last` is null while
                programs give numbers, and stays so if nobody comes to note the last ones. The checksum is of the rest,
                so that no damage makes the file one of another boot, after which numbers would begin at 0 again.

After an orderly stop the numbers go on. Where the last ones are not known, a new generation begins, on all CPUs at
G << 32. G is at least the uptime in seconds, not just one more than the last: a CPU that gives less than 2^32 numbers a
second has not come so far, however long the last generation was in use. Where the file cannot be written, the next
start will believe what it says now, and G is one that it never names. A file that cannot be used is set aside; where it
is missing beside a ledger, somebody has deleted it, and a new generation begins too.
"""

import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from producer.events import STREAMS
from producer.host import state_file

logger = logging.getLogger(__name__)

Numbers = Mapping[str, Sequence[int]]
"""By stream and possible CPU."""

_GENERATION_SHIFT = 32
_MOST_BYTES = 1 << 20  # 4,096 CPUs need a quarter of it
_UNWRITTEN = 1 << 30
"""Set in generations that the file does not name; above any uptime, and numbers with it still fit a signed long."""


@dataclass(frozen=True, slots=True)
class _Note:
    """The content of the file."""

    boot_id: str
    generation: int
    last: Numbers | None


class EventNumbers:
    """The numbers of the host's boot `boot_id`, noted in `folder`. `uptime_s` is the time since then.

    No method raises OSError: a disk that is full or broken costs a jump in the numbers, and a warning.
    """

    def __init__(self, folder: Path, boot_id: str, cpus: int, uptime_s: Callable[[], float] | None = None) -> None:
        self._path = folder / "sequence.json"
        self._boot_id = boot_id
        self._cpus = cpus
        self._uptime_s = uptime_s or _uptime_s
        self._generation = 0

    def start(self, *, overlap: bool = False) -> Numbers:
        """Return the numbers before the first ones of programs that are about to be attached.

        `overlap`: other programs are attached, and still give numbers.
        """
        note = self._read()
        go_on = note.last is not None and not overlap
        self._generation = note.generation if go_on else self._next(note.generation)
        error = self._write(None)
        if error is not None:
            self._generation = self._next(note.generation | _UNWRITTEN)
            logger.warning("%s: %s: the numbers of events jump to %d * 2^32", self._path, error, self._generation)
        elif note.last is not None and go_on:
            return note.last
        return self._all(self._generation << _GENERATION_SHIFT)

    def in_use(self) -> None:
        """Note that programs give numbers which this object has not started: they were taken over."""
        note = self._read()
        self._generation = note.generation
        if note.last is not None and (error := self._write(None)):
            logger.warning("%s: %s: numbers of events may come twice after a crash", self._path, error)

    def stop(self, last: Numbers) -> None:
        """Note the last numbers, after the programs' end."""
        # Programs that were taken over may have begun with a generation that this folder does not know of.
        highest = max(max(numbers) for numbers in last.values())
        self._generation = max(self._generation, highest >> _GENERATION_SHIFT)
        if error := self._write(last):
            logger.warning("%s: %s: the numbers of events will jump at the next start", self._path, error)

    def _next(self, generation: int) -> int:
        return max(generation + 1, generation & _UNWRITTEN | int(self._uptime_s()))

    def _all(self, number: int) -> Numbers:
        return {stream.name: [number] * self._cpus for stream in STREAMS}

    def _read(self) -> _Note:
        try:
            note = _parsed(state_file.read(self._path, _MOST_BYTES))
            if note.boot_id == self._boot_id:
                return self._checked(note)
        except FileNotFoundError:
            if self._was_in_use():
                logger.warning("%s is missing, the numbers of events jump", self._path)
                return _Note(self._boot_id, 0, None)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            aside = state_file.set_aside(self._path)
            where = f"; it is set aside as {aside.name}" if aside else ""
            logger.warning("%s cannot be used, the numbers of events jump: %s%s", self._path, error, where)
            return _Note(self._boot_id, 0, None)
        return _Note(self._boot_id, 0, self._all(0))

    def _was_in_use(self) -> bool:
        """Whether events were numbered here before: ledgers are made after sequence.json."""
        return any(self._path.parent.glob("ledger.*"))

    def _checked(self, note: _Note) -> _Note:
        """Return the note. Raises ValueError, TypeError or AttributeError where it cannot be one."""
        if not state_file.is_count(note.generation, 2 * _UNWRITTEN - 1):
            raise ValueError(f"no generation: {note.generation}")
        if note.last is not None:
            fit = {name: [*map(state_file.is_count, numbers)] for name, numbers in note.last.items()}
            if fit != {stream.name: [True] * self._cpus for stream in STREAMS}:
                raise ValueError("other streams or CPUs")
        return note

    def _write(self, last: Numbers | None) -> OSError | None:
        """Write the file, whole or not at all, and to the disk; return what went wrong."""
        note = _Note(self._boot_id, self._generation, last)
        fresh = self._path.with_suffix(".new")
        try:
            with open(state_file.create(fresh), "wb") as file:
                file.write(_text(note))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            return error
        return None


def _text(note: _Note) -> bytes:
    content = asdict(note)
    return json.dumps({**content, "crc32": _crc32(content)}).encode()


def _parsed(text: bytes) -> _Note:
    """Raises ValueError or TypeError where this is no note."""
    content: Any = state_file.parse(text)
    if not isinstance(content, dict) or content.pop("crc32", None) != _crc32(content):
        raise ValueError("the checksum is wrong")
    return _Note(**content)


def _crc32(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
