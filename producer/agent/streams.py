"""One stream's way, built: its ring, encoder, spool and ledger, brought to one state after whatever came before."""

import functools
import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from producer.backoff import BackOff
from producer.config.load import Config
from producer.encode.batch import BatchEncoder
from producer.encode.isolate import Isolator
from producer.errors import UnavailableError
from producer.events import STREAMS, Batch, EncodedBatch, Rows, SchemaId, Stream
from producer.host.cgroups import CgroupPaths
from producer.host.clock import UtcOffset, boot_id, now
from producer.kernel.capture import Capture
from producer.kernel.hooks import cgroup2_root
from producer.kernel.ringbuf import Ring
from producer.pipeline.ledger import Account, Ledger
from producer.pipeline.stream import Stores, StreamPath, resume
from producer.schemas import load_schema
from producer.spool.spool import Spool

logger = logging.getLogger(__name__)

_BATCH_ROWS = 4096
_SPOOL_WAIT_S = 5.0
_RAW_QUARANTINE_BYTES = 1 << 20


def spool_folder(config: Config, stream: Stream) -> Path:
    """Return the folder of a stream's spool."""
    return config.state_dir / "spool" / stream.name


def quarantine_folder(config: Config, stream: Stream) -> Path:
    """Return the folder of a stream's messages that Kafka has refused."""
    return config.state_dir / "quarantine" / stream.name


def raw_quarantine_path(config: Config, stream: Stream) -> Path:
    """Return the file of a stream's records that could not be made messages."""
    return config.state_dir / "quarantine" / f"{stream.name}.raw.jsonl"


def ledger_path(config: Config, stream: Stream) -> Path:
    """Return the file of a stream's ledger."""
    return config.state_dir / f"ledger.{stream.name}"


def spool_bytes(config: Config, stream: Stream) -> int:
    """Return how large a stream's spool may be; the embedded broker, which keeps nothing, has none."""
    return int(getattr(config.spool, f"{stream.name}_bytes")) if config.kafka.brokers else 0


def new_spool(config: Config, stream: Stream) -> Spool:
    """Return a stream's spool, not yet opened."""
    return Spool(
        spool_folder(config, stream),
        stream,
        load_schema(stream.schema_file),
        now,
        max_bytes=spool_bytes(config, stream),
        max_age_s=config.spool.max_age_s,
        keep=config.spool.keep,
    )


class Quarantine:
    """Where messages go that Kafka has refused: files like a spool's, with the reason, for somebody to look at.

    Records of a ring that cannot be made messages go into a file of their own, with one JSON object on each line:
    `error`, and the record as hexadecimal digits in `record`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._spools = {
            stream.name: Spool(
                quarantine_folder(config, stream),
                stream,
                load_schema(stream.schema_file),
                now,
                max_bytes=config.spool.quarantine_bytes,
            )
            for stream in STREAMS
            if config.kafka.brokers and config.spool.quarantine_bytes
        }
        self._open: set[str] = set()

    def put(self, batch: EncodedBatch, error: str) -> None:
        """Write messages down, as long as there is room."""
        spool = self._spools.get(batch.stream.name)
        if spool is None:
            return
        try:
            if batch.stream.name not in self._open:
                spool.open()
                self._open.add(batch.stream.name)
            spool.append(batch, "", 0, error)
        except OSError as failure:
            logger.warning("quarantine: %d messages are not kept: %s", len(batch), failure.strerror)

    def put_raw(self, stream: Stream, rows: Rows, error: str) -> None:
        """Write records down that cannot be made messages, as long as there is room."""
        logger.warning("encode: %d events are lost topic=%s error=%s", len(rows), stream.topic, error)
        if not self._config.kafka.brokers or not self._config.spool.quarantine_bytes:
            return
        path = raw_quarantine_path(self._config, stream)
        lines = "".join(json.dumps({"error": error, "record": row.tobytes().hex()}) + "\n" for row in rows)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(file, "a") as opened:
                if opened.tell() + len(lines) <= _RAW_QUARANTINE_BYTES:
                    opened.write(lines)
        except OSError as failure:
            logger.warning("quarantine: %d records are not kept: %s", len(rows), failure.strerror)

    def close(self) -> None:
        """Put what was written on the disk itself."""
        for name in self._open:
            self._spools[name].close()


@dataclass(frozen=True, slots=True)
class StreamParts:
    """A stream's parts that outlive a step of the loop."""

    stream: Stream
    ring: Ring
    spool: Spool | None
    path: StreamPath
    trouble: str
    """Why there is no spool, though there should be one."""


class StreamBuilder:
    """Builds streams' ways for `config`, on hooks that are attached; `ids` are the schemas' by the stream's name.

    What is opened is closed by `stack`.
    """

    def __init__(
        self, config: Config, hooks: Capture, ids: Mapping[str, SchemaId], stack: ExitStack, quarantine: Quarantine
    ) -> None:
        self._quarantine = quarantine
        self._config = config
        self._hooks = hooks
        self._ids = ids
        self._stack = stack
        self._fields = {"host": config.host, "boot_id": boot_id()}
        self._cgroups = CgroupPaths(cgroup2_root())
        self._old_rings = hooks.old_rings()

    def build(self, stream: Stream) -> StreamParts:
        """Open a stream's spool and ledger, drain the rings of hooks that were replaced, and go on from there."""
        ledger = Ledger(ledger_path(self._config, stream))
        account = ledger.read()
        trouble = ""
        try:
            ledger.open()
        except OSError as error:
            logger.warning("ledger: %s: counts of this run will not outlive it", error)
        self._stack.callback(ledger.close)
        spool = None
        if spool_bytes(self._config, stream):
            try:
                spool = self._open_spool(stream, account)
            except OSError as error:
                trouble = str(error)
                logger.error("spool: %s: events wait in the ring alone", error)
        old_lost = self._drain_old(stream, spool, account)
        ring = self._stack.enter_context(self._hooks.ring(stream))
        resumed = resume(account, self._hooks.ring_id, ring, spool, spool.last if spool else None)
        stores = Stores(spool, ledger.write, BackOff("spool", most_s=_SPOOL_WAIT_S), self._config.spool.after_s)
        path = StreamPath(stream, ring, self._encoder(stream), stores, resumed)
        path.open({"old_ring": old_lost} if old_lost else {})
        return StreamParts(stream, ring, spool, path, trouble)

    def _open_spool(self, stream: Stream, account: Account | None) -> Spool:
        spool = new_spool(self._config, stream)
        spool.open(*((account.acked, account.end, account.gone) if account else ()))
        self._stack.callback(spool.close)
        if spool.end > spool.acked:
            logger.info("spool: %d events of %s wait since before", spool.end - spool.acked - spool.gone, stream.name)
        return spool

    def _encoder(self, stream: Stream) -> Isolator:
        schema = load_schema(stream.schema_file)
        encoder = BatchEncoder(stream, schema, self._ids[stream.name], self._fields, self._cgroups)
        return Isolator(encoder, functools.partial(self._quarantine.put_raw, stream))

    def _drain_old(self, stream: Stream, spool: Spool | None, account: Account | None) -> int:
        """Move what old rings hold into the spool; return how many events of theirs are lost."""
        lost = 0
        rings = [(old, ring) for old, ring in self._old_rings if old.name == stream.name]
        for number, (old, ring) in enumerate(rings, 1):
            # What is written down of a ring, in the ledger and in the spool, is of the last of them.
            ring_id = self._hooks.old_ring_id if number == len(rings) else None
            with ring:
                if ring_id:
                    ring.position = max([ring.position, *filter(ring.holds, _settled(ring_id, account, spool))])
                    ring.commit(ring.position)
                try:
                    lost += self._move(old, ring, spool, ring_id or "")
                except Exception as error:  # whatever these rings hold, a start goes on
                    logger.error("hooks: %d events of replaced hooks are lost: %s", ring.unread, error)
                lost += ring.unread
        return lost

    def _move(self, stream: Stream, ring: Ring, spool: Spool | None, ring_id: str) -> int:
        """Move what an old ring holds into the spool; return how many events cannot be moved, for what they are."""
        refused = 0
        if spool is None and ring.unread:
            raise UnavailableError("there is no spool")
        encoder, offset_ns = self._encoder(stream), UtcOffset()()
        before = ring.position
        while spool and (len(rows := ring.read(_BATCH_ROWS)) or ring.damaged):
            try:
                if len(rows) and (fit := encoder.fit(rows)) < len(rows):
                    ring.position = before
                    rows = ring.read(fit)
                batch = encoder.encode(Batch(stream, rows), offset_ns) if len(rows) else None
                if batch is not None:
                    spool.append(batch, ring_id, ring.position)
            except Exception:
                ring.position = before
                if encoder.fit(rows) < len(rows):
                    continue  # fewer at a time
                raise
            refused += len(rows) - len(batch or ()) + ring.damaged
            before = ring.position
            ring.commit(before)
        return refused


def _settled(ring_id: str, account: Account | None, spool: Spool | None) -> list[int]:
    """Return positions in a ring before which all is done or on disk, as far as ledger and spool know."""
    last = spool.last if spool else None
    return [each.position for each in (account, last) if each is not None and each.ring == ring_id]
