"""A stream's spool: undelivered events on disk, in order, in a folder of files.

Events are numbered from 0. A file is named by the number of its first event, so the names alone show how many events
each file holds, and how many are missing if one is damaged or deleted. Three numbers advance, always by whole batches:

    acked <= sent <= end      events before `acked` are done, before `sent` were read, before `end` were written

The caller stores `acked` and `end` in its ledger. After a restart, existing files are never written again. A file is
deleted when its events are done, when it is too old, or to make space for new events if configured so. Damaged data is
skipped and counted, and the last few damaged files are kept for inspection. A failed write leaves no trace and can be
repeated. Files are synced (fdatasync) when they are full and when the producer stops: a killed process loses nothing, a
power cut loses what was written last.

No clock and no retries here: time is passed in, and OSError goes to the caller.
"""

import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from producer.events import EncodedBatch, Stream
from producer.host import state_file
from producer.host.clock import Moment
from producer.spool.disk import UNRELATED, Disk, Retries
from producer.spool.files import ASIDE_SUFFIX, SPOOL_SUFFIX, SpoolFile, files, made_at, make_folder, size_bytes
from producer.spool.format import DamagedError, Reader, Spooled, block, container_schema, header, read_header
from producer.spool.remains import exclude_remains

logger = logging.getLogger(__name__)

HEADER_BYTES = 1 << 16
"""A header fits in this many bytes."""
_MOST_EXPIRED = 16
_MOST_ASIDE = 4
_FILE_BYTES = 1 << 24
_MOST_FILE_BYTES = 1 << 28
"""Larger than any file of ours; the rest of a larger one is not read."""
_FILE_AGE_S = 3600.0


class FullError(OSError):
    """The spool is full, and new events are rejected."""


class Spool:
    """The spool of `stream` in `folder`, of at most `max_bytes`, for events of the Avro schema `schema`.

    Files have about `file_bytes`, or an eighth of `max_bytes` if that is less. When the spool is full, `when_full`
    "reject" raises FullError, and "drop_oldest" deletes the oldest file. `lost` counts lost events by reason.
    """

    def __init__(
        self,
        folder: Path,
        stream: Stream,
        schema: Mapping[str, Any],
        now: Callable[[], Moment],
        *,
        max_bytes: int,
        max_age_s: float = float("inf"),
        when_full: str = "reject",
        file_bytes: int = _FILE_BYTES,
        disk: Disk | None = None,
    ) -> None:
        self._folder = folder
        self._stream = stream
        self._schema = container_schema(schema)
        self._now = now
        self.max_bytes = max_bytes
        self._file_bytes = min(file_bytes, max_bytes // 8)
        self._max_age_s = max_age_s
        self._when_full = when_full
        self._disk = disk or Disk()
        self._files: list[SpoolFile] = []
        self._aside: dict[Path, int] = {}
        self._writer: tuple[SpoolFile, int, bytes] | None = None
        """The file being written, its descriptor and its sync marker."""
        self._reading: tuple[SpoolFile, int, Reader] | None = None
        self._retries = Retries(now)
        self.acked = self.sent = self.end = 0
        self.discarded = 0
        """Events from `acked` on that are already counted as lost."""
        self.lost: Counter[str] = Counter()
        self.last: Spooled | None = None
        """The last batch found when the spool was opened."""

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self._files) + sum(self._aside.values())

    @property
    def pending(self) -> int:
        """Events that are not done, in flight or not."""
        return self.end - self.acked - self.discarded

    def open(self, acked: int | None = None, end: int = 0, discarded: int = 0) -> None:
        """Scan the folder. `acked`, `end` and `discarded` come from the ledger, if there is one.

        OSError: nothing has changed, and it can be repeated.
        """
        make_folder(self._folder)
        self._aside = {path: size_bytes(path) for path in files(self._folder, ASIDE_SUFFIX)}
        self._files = [self._found(path) for path in files(self._folder, SPOOL_SUFFIX)]
        if acked is not None:
            self._set_strays_aside(end)
        for file, following in pairwise(self._files):
            file.end = following.base
            if discarded and (last := self._last_of(file)):  # events between the two were discarded
                file.end = min(last.end, following.base)
        self.end = end
        if self._files:
            self._find_end(self._files[-1])
        first = self._files[0].base if self._files else self.end
        # A ledger without an end knows of no spool: it is of a run without one.
        self.acked = self.sent = min(acked, self.end) if acked is not None and end else first
        self.discarded = min(discarded, self.end - self.acked)
        exclude_remains(self._files, self.acked, self.pending)
        self.sweep()

    def append(self, batch: EncodedBatch, ring: str, position: int, reason: str = "") -> None:
        """Append a batch, whose last event ends at `position` of the ring `ring`.

        Raises OSError if it cannot be written, and then nothing has changed.
        """
        if self._writer and (
            self._writer[0].size >= self._file_bytes
            or self._now().since(self._writer[0].made) > _FILE_AGE_S
            or not self._disk.is_linked(self._writer[1])
        ):
            self._end_writer()
        file, descriptor, sync = self._writer or self._begin_writer()
        data = block(Spooled(batch, self.end, ring, position, reason), sync)
        self._make_room(len(data))
        self._write(file, descriptor, data)
        self.end = file.end = self.end + len(batch)

    def read(self) -> Spooled | None:
        """Return the next batch after `sent` and move `sent` past it; None if there is none. OSError: retry later.

        Unreadable events are skipped, if need be up to `end`.
        """
        while True:
            if self._reading is None and not self._begin_reading():
                self.sent = self.end
                return None
            assert self._reading is not None
            file, _, reader = self._reading
            try:
                spooled = reader.next()
            except OSError as error:
                self._end_reading()  # a descriptor may stay broken when its disk comes back
                self._skip(file, error)
                continue
            self._retries.reset()
            file.damaged |= reader.damaged or file.size > _MOST_FILE_BYTES
            if spooled is None:
                if self._is_written(file) and self.sent == self.end:
                    return None
                self._end_reading()
                self.sent = max(self.sent, file.end)
                if self.sent == self.end:
                    return None
            elif self.sent < spooled.end <= file.end:  # beyond that are remains of a failed write
                self.sent = spooled.end
                return spooled

    def rewind(self, first: int) -> None:
        """Read the events from `first` on again: they could not be sent."""
        self._end_reading()
        self.sent = first

    def ack(self, first: int, end: int) -> None:
        """Mark all events before `end` as done. Those from `acked` to `first` could not be read and are lost.

        The caller writes its ledger and then calls `sweep`.
        """
        missing = max(0, first - self.acked)
        counted = min(missing, self.discarded)
        self.discarded -= counted
        if missing > counted:
            self.lost["spool_damaged"] += missing - counted
            logger.error("spool: %d damaged events lost folder=%s", missing - counted, self._folder)
        self.acked = end

    def sweep(self) -> None:
        """Delete files whose events are done."""
        if self.acked == self.end:
            self._end_writer(sync=False)
        for file in [each for each in self._files if each.end <= self.acked]:
            if not self._is_written(file):
                self._remove(file)

    def expire(self) -> None:
        """Delete files that are too old, a few per call, and only those with nothing in flight."""
        now = self._now()
        expired = [file for file in self._untouched() if now.since(file.made) > self._max_age_s]
        for file in expired[:_MOST_EXPIRED]:
            self._discard(file, "spool_expired")

    def close(self) -> None:
        """Sync and close all files."""
        self._end_reading()
        self._end_writer()

    def _found(self, path: Path) -> SpoolFile:
        made = None
        try:
            with open(state_file.open_regular(path), "rb") as file:
                made = made_at(read_header(file.read(HEADER_BYTES))[2])
        except DamagedError:
            pass
        except OSError as error:
            if error.errno in UNRELATED:
                raise
        return SpoolFile(int(path.stem), int(path.stem), path, size_bytes(path), made or self._now())

    def _set_strays_aside(self, end: int) -> None:
        """Set files aside that hold nothing and whose names are beyond the ledger's `end`.

        The ledger knows of no events there. If they moved `end`, all numbers up to them would count as lost.
        """
        while self._files and self._files[-1].base > end and self._last_of(self._files[-1]) is None:
            self._files[-1].damaged = True
            self._remove(self._files[-1])

    def _last_of(self, file: SpoolFile) -> Spooled | None:
        """Return the last readable batch of a file, and note whether anything on the way to it is damaged."""
        last = None
        file.damaged = file.size > 0 or not file.path.is_file()
        try:
            descriptor, reader = self._open(file)
            try:
                last = reader.last(file.size)
                file.damaged = reader.damaged or file.size > _MOST_FILE_BYTES
            finally:
                os.close(descriptor)
        except DamagedError:
            pass
        except OSError as error:
            if error.errno in UNRELATED:
                raise
            logger.error("spool: cannot read %s: %s", file.path, error.strerror)
        return last

    def _find_end(self, file: SpoolFile) -> None:
        """Find the end of the last file; delete the file if it is empty."""
        self.last = self._last_of(file)
        self.end = max(self.end, file.base, self.last.end if self.last else 0)
        file.end = self.end
        if file.end == file.base:
            self._remove(file)

    def _begin_writer(self) -> tuple[SpoolFile, int, bytes]:
        made, sync = self._now(), os.urandom(16)
        data = header(self._schema, {"rebpf.made": json.dumps(asdict(made))}, sync)
        self._make_room(len(data))
        path = self._folder / f"{self.end:020}{SPOOL_SUFFIX}"
        descriptor = self._disk.create(path)
        file = SpoolFile(self.end, self.end, path, 0, made)
        try:
            self._write(file, descriptor, data)
        except OSError:
            os.close(descriptor)
            self._disk.unlink(path)
            raise
        self._files.append(file)
        self._writer = (file, descriptor, sync)
        return self._writer

    def _write(self, file: SpoolFile, descriptor: int, data: bytes) -> None:
        """Append to a file, all or nothing."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._disk.write(descriptor, left) :]
        except OSError:
            try:
                self._disk.truncate(descriptor, file.size)
            except OSError:  # readers skip the rest, and nothing is written after it
                file.size += len(data) - len(left)
                self._end_writer(sync=False)
            raise
        file.size += len(data)

    def _end_writer(self, *, sync: bool = True) -> None:
        if self._writer is None:
            return
        file, descriptor, _ = self._writer
        self._writer = None
        try:
            try:
                if sync:
                    self._disk.sync(descriptor)
            finally:
                os.close(descriptor)  # which reports failed writes, too, on NFS
        except OSError as error:
            logger.warning("spool: cannot sync %s: %s", file.path, error.strerror)
        if file.end == file.base:
            self._remove(file)

    def _begin_reading(self) -> bool:
        """Open the first file with events after `sent`."""
        for file in [each for each in self._files if each.end > self.sent]:
            try:
                self._reading = (file, *self._open(file))
            except (DamagedError, OSError) as error:
                self._skip(file, error)
            else:
                return True
        return False

    def _skip(self, file: SpoolFile, error: DamagedError | OSError) -> None:
        """Skip a damaged file, or one that cannot be read; raise the error as long as a retry may succeed."""
        if isinstance(error, OSError):
            if self._retries.allow(file.path, error):
                raise error
            logger.error("spool: cannot read %s: %s", file.path, error.strerror)
        file.damaged = True
        self.sent = max(self.sent, file.end)

    def _open(self, file: SpoolFile) -> tuple[int, Reader]:
        """Open a file for reading, and return its descriptor and reader. Raises DamagedError or OSError."""
        descriptor = self._disk.open(file.path)

        def read_at(offset: int, size: int) -> bytes:
            return self._disk.read_at(descriptor, offset, max(0, min(size, _MOST_FILE_BYTES - offset)))

        try:
            start, sync, _ = read_header(read_at(0, HEADER_BYTES))
        except (DamagedError, OSError):
            os.close(descriptor)
            raise
        return descriptor, Reader(self._stream, sync, start, read_at)

    def _end_reading(self) -> None:
        if self._reading:
            os.close(self._reading[1])
            self._reading = None

    def _is_written(self, file: SpoolFile) -> bool:
        return self._writer is not None and self._writer[0] is file

    def _untouched(self) -> list[SpoolFile]:
        """Return the files of which nothing was sent: others stay until it is acknowledged."""
        return [file for file in self._files if file.base >= self.sent]

    def _make_room(self, size: int) -> None:
        while self._aside and self.size_bytes + size > self.max_bytes:
            self._forget_aside()
        while self.size_bytes + size > self.max_bytes:
            untouched = [file for file in self._untouched() if not self._is_written(file)]
            if self._when_full != "drop_oldest" or not untouched:
                raise FullError(errno.ENOSPC, f"the spool is full: {self.max_bytes} bytes")
            self._discard(untouched[0], "spool_dropped")

    def _discard(self, file: SpoolFile, reason: str) -> None:
        """Delete a file of unsent events, and count them as lost."""
        count = file.end - max(file.base, self.acked)
        if self._reading and self._reading[0] is file:
            self._end_reading()
        if self._is_written(file):
            self._end_writer(sync=False)
        if file not in self._files:
            return  # it was empty and was deleted with its writer
        self._disk.unlink(file.path)
        self._files.remove(file)
        self.discarded += count
        self.lost[reason] += count
        logger.error("spool: %d events discarded reason=%s file=%s", count, reason, file.path)

    def _remove(self, file: SpoolFile) -> None:
        if self._reading and self._reading[0] is file:
            self._end_reading()
        try:
            if file.damaged:
                aside = file.path.with_suffix(ASIDE_SUFFIX)
                logger.error("spool: %s is damaged, renamed to %s", file.path, aside.name)
                self._disk.rename(file.path, aside)
                if file.size:
                    self._aside[aside] = file.size
                while len(self._aside) > _MOST_ASIDE:
                    self._forget_aside()
            else:
                self._disk.unlink(file.path)
        except OSError as error:  # read-only disk: the ledger has it as done
            logger.warning("spool: cannot remove %s: %s", file.path, error.strerror)
        self._files.remove(file)

    def _forget_aside(self) -> None:
        path = next(iter(self._aside))
        del self._aside[path]
        self._disk.unlink(path)
