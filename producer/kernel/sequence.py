"""Where event numbers (cpu_seq) begin, so that none is used twice within a boot. A small file records the last ones.

sequence.json   {"boot_id": ..., "generation": G, "last": {stream: [number by CPU]}, "crc32": ...}: `last` is null while
                programs assign numbers, and stays null after a crash. The checksum covers the rest, so that no damage
                can make the file look like one of another boot, after which numbers would begin at 0 again.

After an orderly stop the numbers continue. If the last ones are unknown, a new generation begins, on all CPUs at
G << 32. G is at least the uptime in seconds, not only one more than the last: a CPU that assigns less than 2^32 numbers
per second cannot have reached it, however long the last generation was in use. If the file cannot be written, the next
start will trust its current content and may continue its generation, so G is in the other half of all generations. An
unusable file is set aside. If it is missing next to a ledger, it was deleted, and a new generation begins too.
"""

import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from producer.events import STREAMS
from producer.host import state_file
from producer.host.text import parse_json

logger = logging.getLogger(__name__)

Numbers = Mapping[str, Sequence[int]]
"""By stream and possible CPU."""

_GENERATION_SHIFT = 32
_MOST_BYTES = 1 << 20  # 4,096 CPUs need a quarter of it
_HALF = 1 << 30
"""The bit that separates the two halves. Above any uptime; numbers with it still fit a signed long."""
_MOST_GENERATIONS = 2 * _HALF - 1


@dataclass(frozen=True, slots=True)
class _Note:
    """The content of the file."""

    boot_id: str
    generation: int
    last: Numbers | None


class EventNumbers:
    """The event numbers of the boot `boot_id`, recorded in `folder`. `uptime_s` is the time since boot.

    No method raises OSError: a full or broken disk causes a jump in the numbers, and a warning.
    """

    def __init__(
        self,
        folder: Path,
        boot_id: str,
        cpus: int,
        uptime_s: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._path = folder / "sequence.json"
        self._boot_id = boot_id
        self._cpus = cpus
        self._uptime_s = uptime_s
        self._generation = 0

    def start(self, *, overlap: bool = False) -> Numbers:
        """Return the numbers before the first ones of programs that are about to be attached.

        `overlap`: other programs are attached and still assign numbers.
        """
        note = self._read()
        go_on = note.last is not None and not overlap
        self._generation = note.generation if go_on else self._next(note.generation)
        error = self._write(None)
        if error is not None:
            self._generation = self._next(note.generation ^ _HALF)
            logger.warning("%s: %s: event numbers jump to %d * 2^32", self._path, error, self._generation)
        elif note.last is not None and go_on:
            return note.last
        return self._all(self._generation << _GENERATION_SHIFT)

    def resume(self) -> None:
        """Record that programs which were taken over are assigning numbers."""
        note = self._read()
        self._generation = note.generation
        if note.last is not None and (error := self._write(None)):
            logger.warning("%s: %s: event numbers may be repeated after a crash", self._path, error)

    def stop(self, last: Numbers) -> None:
        """Record the last numbers, after the programs are detached."""
        # Programs that were taken over may have begun with a generation that is not in this folder.
        highest = max(max(numbers) for numbers in last.values()) >> _GENERATION_SHIFT
        is_other_half = (highest ^ self._generation) & _HALF
        self._generation = highest if is_other_half else max(self._generation, highest)
        if error := self._write(last):
            logger.warning("%s: %s: event numbers will jump at the next start", self._path, error)

    def _next(self, generation: int) -> int:
        return max(generation + 1, generation & _HALF | int(self._uptime_s()))

    def _all(self, number: int) -> Numbers:
        return {stream.name: [number] * self._cpus for stream in STREAMS}

    def _read(self) -> _Note:
        try:
            note = _parsed(state_file.read(self._path, _MOST_BYTES))
            if note.boot_id == self._boot_id:
                return self._checked(note)
        except FileNotFoundError:
            if self._was_in_use():
                logger.warning("%s is missing, event numbers jump", self._path)
                return _Note(self._boot_id, 0, None)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            aside = state_file.set_aside(self._path)
            where = f"; set aside as {aside.name}" if aside else ""
            logger.warning("%s cannot be used, event numbers jump: %s%s", self._path, error, where)
            return _Note(self._boot_id, 0, None)
        return _Note(self._boot_id, 0, self._all(0))

    def _was_in_use(self) -> bool:
        """Whether events were numbered here before: ledgers are created after sequence.json."""
        return any(self._path.parent.glob("ledger.*"))

    def _checked(self, note: _Note) -> _Note:
        """Return the note. Raises ValueError, TypeError or AttributeError if it is invalid."""
        if not state_file.is_count(note.generation, _MOST_GENERATIONS):
            raise ValueError(f"invalid generation: {note.generation}")
        if note.last is not None:
            most = _MOST_GENERATIONS << _GENERATION_SHIFT
            fit = {name: [state_file.is_count(each, most) for each in last] for name, last in note.last.items()}
            if fit != {stream.name: [True] * self._cpus for stream in STREAMS}:
                raise ValueError("the streams or CPUs do not match")
        return note

    def _write(self, last: Numbers | None) -> OSError | None:
        """Write and sync the file atomically. Return the error, if any."""
        note = _Note(self._boot_id, self._generation, last)
        try:
            state_file.write(self._path, _text(note), sync=True)
        except OSError as error:
            return error
        return None


def _text(note: _Note) -> bytes:
    content = asdict(note)
    return json.dumps({**content, "crc32": _crc32(content)}).encode()


def _parsed(text: bytes) -> _Note:
    """Raises ValueError or TypeError if this is not a note."""
    content: Any = parse_json(text)
    if not isinstance(content, dict) or content.pop("crc32", None) != _crc32(content):
        raise ValueError("wrong checksum")
    return _Note(**content)


def _crc32(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
