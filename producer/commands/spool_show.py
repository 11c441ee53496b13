"""Reads the spool without changing it: `rebpf spool show` and `rebpf spool verify`.

Nothing is created, deleted or locked. A producer may be running, so the ledger and the files may be from different
moments. Events that were appended before the files are read and are not done afterwards must be in the files: `end` is
read before them, `acked` and `discarded` after. A file that vanishes between listing and opening is done.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from producer.config.load import Config
from producer.errors import PermissionDenied, UnavailableError
from producer.events import STREAMS, Stream, Topic
from producer.host.clock import Moment, now
from producer.host.state_file import NotAFileError, open_regular
from producer.host.text import lines
from producer.pipeline.ledger import Account, Ledger
from producer.spool.files import ASIDE_SUFFIX, SPOOL_SUFFIX, files, made_at, size_bytes
from producer.spool.format import DamagedError, Reader, read_header
from producer.spool.from_config import ledger_path, quarantine_folder, spool_folder
from producer.spool.spool import HEADER_BYTES
from producer.topics import topic


@dataclass(frozen=True, slots=True)
class Waiting:
    """The spooled events of a stream."""

    events: int
    """Events that are not yet delivered."""
    files: int
    size_bytes: int
    """Size of the spool files and of damaged files kept for inspection."""
    oldest_s: float | None
    """Age of the oldest file with undelivered events; None if unknown."""
    damaged_files: int
    """Damaged files kept for inspection."""
    quarantine: Mapping[str, int]
    """Messages that Kafka has rejected, by reason."""

    def __str__(self) -> str:
        oldest = "" if self.oldest_s is None else f" oldest_s={self.oldest_s:.0f}"
        reasons = ",".join(f"{reason}:{count}" for reason, count in self.quarantine.items()) or "0"
        return (
            f"events={self.events} files={self.files} size_bytes={self.size_bytes}{oldest} "
            f"damaged_files={self.damaged_files} quarantine={reasons}"
        )


@dataclass(frozen=True, slots=True)
class Damage:
    """The damage in a file, or in place of a missing file."""

    file: str
    places: int
    lost: int
    """Undelivered events that cannot be read. Events that were done are not lost."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of reading all files of a folder."""

    files: int
    events: int
    """Readable events, done or not."""
    damage: tuple[Damage, ...]

    @property
    def lost(self) -> int:
        """Undelivered events that cannot be read."""
        return sum(each.lost for each in self.damage)

    def as_dict(self) -> dict[str, object]:
        """Return the result for JSON output."""
        return {**asdict(self), "lost": self.lost}

    def __str__(self) -> str:
        places = sum(each.places for each in self.damage)
        summary = f"files={self.files} events={self.events} damaged_places={places} lost={self.lost}"
        return lines(
            [summary, *(f"  {each.file} damaged_places={each.places} lost={each.lost}" for each in self.damage)]
        )


@dataclass(frozen=True, slots=True)
class _Span:
    """A batch: events `first` to `end` - 1."""

    first: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True)
class _SpoolFile:
    """A spool file as it was when it was opened; `made` is None if its header cannot be read."""

    name: str
    base: int
    size_bytes: int
    made: Moment | None
    spans: Sequence[_Span] = ()
    is_damaged: bool = False
    """Whether something in it could not be read."""

    @property
    def end(self) -> int:
        """Number after the last readable event."""
        return self.spans[-1].end if self.spans else self.base


@contextmanager
def disk_errors() -> Iterator[None]:
    """Translate OSError to subclasses of RebpfError."""
    try:
        yield
    except PermissionError as error:
        raise PermissionDenied(f"{error.filename}: {error.strerror}") from error
    except OSError as error:
        raise UnavailableError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


def require_state_folder(config: Config) -> None:
    """Raise UnavailableError if there is no state folder."""
    if not config.state_dir.is_dir():
        raise UnavailableError(f"no state folder {config.state_dir}")


def spooled(config: Config) -> dict[Topic, Waiting] | None:
    """Return the spooled events by topic; None if there is no state folder."""
    with disk_errors():
        if not config.state_dir.is_dir():
            return None
        return {topic(config, stream): _waiting(config, stream) for stream in STREAMS}


def verify(config: Config) -> dict[str, Verified]:
    """Read all files: each spool by its topic, and each quarantine that has files by TOPIC/quarantine."""
    found = {}
    with disk_errors():
        require_state_folder(config)
        for stream in STREAMS:
            name = topic(config, stream)
            found[str(name)] = _verify(spool_folder(config, stream), stream, ledger_path(config, stream))
            if files(folder := quarantine_folder(config, stream), SPOOL_SUFFIX):
                found[f"{name}/quarantine"] = _verify(folder, stream, None)
    return found


def complaint(verified: Mapping[str, Verified]) -> str | None:
    """Return the damage in one line; None if there is none."""
    damaged = [
        f"{name}: {sum(each.places for each in found.damage)} damaged places, {found.lost} events lost"
        for name, found in verified.items()
        if found.damage
    ]
    return "; ".join(damaged) or None


def quarantined(config: Config, stream: Stream) -> Counter[str]:
    """Return the number of messages in a stream's quarantine, by reason."""
    counts: Counter[str] = Counter()
    for file in _read_files(files(quarantine_folder(config, stream), SPOOL_SUFFIX), stream):
        for span in file.spans:
            counts[span.reason] += span.end - span.first
    return counts


def _waiting(config: Config, stream: Stream) -> Waiting:
    folder = spool_folder(config, stream)
    paths, aside = files(folder, SPOOL_SUFFIX), files(folder, ASIDE_SUFFIX)
    # The names say how many events each file holds, except the last: a producer that crashed may have written more.
    spool_files = [*_read_files(paths[:-1], stream, whole=False), *_read_files(paths[-1:], stream)]
    account = _account(ledger_path(config, stream))
    end = max(account.end if account else 0, spool_files[-1].end if spool_files else 0)
    first = spool_files[0].base if spool_files else end
    acked = min(account.acked, end) if account else first
    events = end - acked - min(account.discarded if account else 0, end - acked)
    limits = [*(each.base for each in spool_files[1:]), end]
    made = next((each.made for each, limit in zip(spool_files, limits, strict=False) if limit > acked), None)
    return Waiting(
        events,
        len(spool_files),
        sum(file.size_bytes for file in spool_files) + sum(map(size_bytes, aside)),
        max(0.0, now().since(made)) if events and made else None,
        len(aside),
        dict(quarantined(config, stream)),
    )


def _verify(folder: Path, stream: Stream, ledger: Path | None) -> Verified:
    before = _account(ledger)
    spool_files = list(_read_files(files(folder, SPOOL_SUFFIX), stream))
    after = _account(ledger)
    end = max(before.end if before else 0, spool_files[-1].end if spool_files else 0)
    first = spool_files[0].base if spool_files else end
    acked = after.acked if after else first
    discarded = after.discarded if after else 0
    damage = []

    def lost_in(start: int, stop: int) -> int:
        """Return how many events of a gap are undelivered."""
        return max(0, stop - max(start, acked))

    def lost_between_files(start: int, stop: int) -> int:
        """Return the same for a gap between files, without discarded events, which are counted already."""
        nonlocal discarded
        counted = min(discarded, lost_in(start, stop))
        discarded -= counted
        return lost_in(start, stop) - counted

    if lost := lost_between_files(acked, first):
        damage.append(Damage("(no file)", 1, lost))
    for file, limit in zip(spool_files, [*(each.base for each in spool_files[1:]), end], strict=False):
        limit = max(limit, file.end)
        gaps = list(_gaps(file))
        missing_after = lost_between_files(file.end, limit)
        no_header = file.made is None and not file.spans and limit > file.base
        places = len(gaps) + (missing_after > 0 or no_header) or int(file.is_damaged)
        if places:
            damage.append(Damage(file.name, places, sum(lost_in(*gap) for gap in gaps) + missing_after))
    events = sum(span.end - span.first for span in chain.from_iterable(each.spans for each in spool_files))
    return Verified(len(spool_files), events, tuple(damage))


def _gaps(file: _SpoolFile) -> Iterator[tuple[int, int]]:
    """Yield the gaps between a file's start and its last batch."""
    expected = file.base
    for span in file.spans:
        if span.first > expected:
            yield expected, span.first
        expected = span.end


def _read_files(paths: Sequence[Path], stream: Stream, *, whole: bool = True) -> Iterator[_SpoolFile]:
    """Read files, or only their headers if not `whole`."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield _read_file(path, stream, whole=whole)


def _read_file(path: Path, stream: Stream, *, whole: bool) -> _SpoolFile:
    base = int(path.stem)
    try:
        descriptor = open_regular(path)
    except NotAFileError:
        return _SpoolFile(path.name, base, 0, None)
    with open(descriptor, "rb") as file:
        # Ignore what is appended from now on: half a block would look like damage.
        size_bytes = os.fstat(file.fileno()).st_size

        def read_at(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), max(0, min(size, size_bytes - offset)), offset)

        try:
            start, sync, metadata = read_header(read_at(0, HEADER_BYTES))
        except (OSError, DamagedError):
            return _SpoolFile(path.name, base, size_bytes, None)
        made = made_at(metadata)
        if not whole:
            return _SpoolFile(path.name, base, size_bytes, made)
        reader = Reader(stream, sync, start, read_at)
        spans, failed = [], False
        try:
            while batch := reader.next():
                spans.append(_Span(batch.first, batch.end, batch.reason))
        except OSError:
            failed = True
        return _SpoolFile(path.name, base, size_bytes, made, spans, failed or reader.damaged)


def _account(ledger: Path | None) -> Account | None:
    if ledger is None:
        return None
    # A read during a write may return a mix of old and new.
    return Ledger(ledger).read() or Ledger(ledger).read()
