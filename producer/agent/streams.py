"""Builds a stream: its ring, encoder, spool and ledger, recovered to one consistent state."""

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from producer.backoff import BackOff
from producer.config.load import Config
from producer.encode.batch import BatchEncoder, Key
from producer.encode.isolate import Isolator
from producer.errors import UnavailableError
from producer.events import STREAMS, EncodedBatch, Rows, SchemaId, Stream
from producer.health import metrics
from producer.host.cgroups import CgroupPaths, cgroup2_root
from producer.host.clock import UtcOffset, boot_id, now
from producer.host.log_limit import LogLimit
from producer.host.pods import Pods, PodSource
from producer.kafka.wording import REPEAT_LOG_S
from producer.kernel.capture import Capture
from producer.kernel.ringbuf import Ring
from producer.pipeline.ledger import Account, Ledger
from producer.pipeline.recovery import drain, resume
from producer.pipeline.stream import Stores, StreamPipeline
from producer.schemas import load_schema
from producer.spool.disk import PASSING, UNRELATED
from producer.spool.files import SPOOL_SUFFIX, files
from producer.spool.spool import Spool

logger = logging.getLogger(__name__)

_SPOOL_WAIT_S = 5.0
_RAW_QUARANTINE_BYTES = 1 << 20


def spool_folder(config: Config, stream: Stream) -> Path:
    """Return the folder of a stream's spool."""
    return config.state_dir / "spool" / stream.name


def quarantine_folder(config: Config, stream: Stream) -> Path:
    """Return the folder of a stream's messages that Kafka has rejected."""
    return config.state_dir / "quarantine" / stream.name


def raw_quarantine_path(config: Config, stream: Stream) -> Path:
    """Return the file of a stream's records that could not be encoded."""
    return config.state_dir / "quarantine" / f"{stream.name}.raw.jsonl"


def ledger_path(config: Config, stream: Stream) -> Path:
    """Return the file of a stream's ledger."""
    return config.state_dir / f"ledger.{stream.name}"


def spool_bytes(config: Config, stream: Stream) -> int:
    """Return the size limit of a stream's spool. With the test broker, which stores nothing, it is 0."""
    return int(getattr(config.spool, f"{stream.name}_bytes")) if config.kafka.brokers else 0


def has_undelivered(config: Config, hooks: Capture, stream: Stream) -> bool:
    """Whether an earlier run has left events of this stream, on disk or in a ring."""
    with _unavailable("spool", UNRELATED):
        on_disk = spool_bytes(config, stream) and files(spool_folder(config, stream), SPOOL_SUFFIX)
    return bool(on_disk) or stream in hooks.old_streams


def new_spool(config: Config, stream: Stream) -> Spool:
    """Return a stream's spool, not yet opened."""
    return Spool(
        spool_folder(config, stream),
        stream,
        load_schema(stream.schema_file),
        now,
        max_bytes=spool_bytes(config, stream),
        max_age_s=config.spool.max_age_s,
        when_full=config.spool.when_full,
    )


class Quarantine:
    """Stores messages that Kafka has rejected, with the reason, in files like a spool's.

    Records that cannot be encoded go to a separate file with one JSON object per line: `error`, and `record` in
    hexadecimal.
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
        self._log_limit = LogLimit(REPEAT_LOG_S)
        self._not_stored = 0
        """Messages that were not stored since the last log line."""

    def put(self, batch: EncodedBatch, error: str) -> None:
        """Store messages, up to the size limit."""
        spool = self._spools.get(batch.stream.name)
        if spool is None:
            return
        try:
            if batch.stream.name not in self._open:
                spool.open()
                self._open.add(batch.stream.name)
            spool.append(batch, "", 0, error)
        except OSError as failure:
            self._not_stored += len(batch)
            if self._log_limit.allows("messages"):
                logger.warning("quarantine: cannot store %d messages: %s", self._not_stored, failure.strerror)
                self._not_stored = 0

    def put_raw(self, stream: Stream, rows: Rows, error: str) -> None:
        """Store records that cannot be encoded, up to the size limit."""
        logger.warning("encode: %d events lost topic=%s error=%s", len(rows), stream.topic, error)
        if not self._config.kafka.brokers or not self._config.spool.quarantine_bytes:
            return
        path = raw_quarantine_path(self._config, stream)
        lines = "".join(json.dumps({"error": error, "record": row.tobytes().hex()}) + "\n" for row in rows)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(path, flags | os.O_NONBLOCK, 0o600)  # a pipe without a reader would block
            with open(file, "a") as opened:
                if opened.tell() + len(lines) <= _RAW_QUARANTINE_BYTES:
                    opened.write(lines)
        except OSError as failure:
            logger.warning("quarantine: cannot store %d records: %s", len(rows), failure.strerror)

    def close(self) -> None:
        """Sync the files to disk and close them."""
        for name in self._open:
            self._spools[name].close()


@dataclass(frozen=True, slots=True)
class StreamParts:
    """The parts of one stream."""

    stream: Stream
    ring: Ring
    spool: Spool | None
    pipeline: StreamPipeline
    open_error: str
    """Why the spool could not be opened; empty if it was, or if none is configured."""


def _pods(config: Config) -> Pods:
    kubernetes = config.kubernetes
    return Pods(PodSource(str(kubernetes.pods_url), kubernetes.token, kubernetes.ca))


class StreamBuilder:
    """Builds streams on hooks; `ids` are the schema ids by the stream's name. `stack` closes what is opened."""

    def __init__(
        self, config: Config, hooks: Capture, ids: Mapping[str, SchemaId], stack: ExitStack, quarantine: Quarantine
    ) -> None:
        self._quarantine = quarantine
        self._config = config
        self._hooks = hooks
        self._ids = ids
        self._stack = stack
        self._fields = {"host": config.host, "boot_id": boot_id(), "labels": dict(config.labels)}
        self._cgroups = CgroupPaths(cgroup2_root())
        self._pods = stack.enter_context(_pods(config)) if config.kubernetes.pods_url else None
        self._isolators: list[tuple[Stream, Isolator]] = []
        self._old_rings = hooks.old_rings()

    def build(self, stream: Stream) -> StreamParts:
        """Open a stream's spool and ledger, drain the rings of replaced hooks, and recover the account."""
        ledger = Ledger(ledger_path(self._config, stream))
        with _unavailable("ledger", UNRELATED):
            account = ledger.read()
        open_error = ""
        try:
            with _unavailable("ledger", PASSING):
                ledger.open()
        except OSError as error:
            logger.warning("ledger: %s: this run's loss counts will not survive a restart", error)
        self._stack.callback(ledger.close)
        spool = None
        if spool_bytes(self._config, stream):
            try:
                with _unavailable("spool", UNRELATED):
                    spool = self._open_spool(stream, account)
            except OSError as error:
                open_error = str(error)
                logger.error("spool: %s: continuing without a spool", error)
        old_lost = self._drain_old(stream, spool, account)
        ring = self._stack.enter_context(self._hooks.ring(stream))
        resumed = resume(account, self._hooks.ring_id, ring, spool)
        stores = Stores(spool, ledger.write, BackOff("spool", most_s=_SPOOL_WAIT_S), self._config.spool.spill_after_s)
        count = metrics.TCP.counter(stream) if stream in self._config.capture.streams else None
        encoder = self._isolator(stream)
        self._isolators.append((stream, encoder))
        pipeline = StreamPipeline(stream, ring, encoder, stores, resumed, count)
        pipeline.account.open({"old_ring": old_lost} if old_lost else {})
        return StreamParts(stream, ring, spool, pipeline, open_error)

    def _open_spool(self, stream: Stream, account: Account | None) -> Spool:
        spool = new_spool(self._config, stream)
        spool.open(*((account.acked, account.end, account.discarded) if account else ()))
        self._stack.callback(spool.close)
        if spool.end > spool.acked:
            logger.info("spool: %d events of %s from an earlier run", spool.pending, stream.name)
        return spool

    def relabel(self, labels: Mapping[str, str]) -> None:
        """Encode with other labels of the site from now on."""
        self._fields = {**self._fields, "labels": dict(labels)}
        for stream, isolator in self._isolators:
            isolator.encoder = self._encoder(stream)

    def _isolator(self, stream: Stream) -> Isolator:
        return Isolator(self._encoder(stream), functools.partial(self._quarantine.put_raw, stream))

    def _encoder(self, stream: Stream) -> BatchEncoder:
        schema = load_schema(stream.schema_file)
        key = cast(Key, self._config.kafka.key)  # validated
        return BatchEncoder(stream, schema, self._ids[stream.name], self._fields, self._cgroups, key, self._pods)

    def _drain_old(self, stream: Stream, spool: Spool | None, account: Account | None) -> int:
        """Move the events of replaced hooks' rings into the spool; return how many are lost."""
        lost = 0
        rings = [(old, ring) for old, ring in self._old_rings if old.name == stream.name]
        for number, (old, ring) in enumerate(rings, 1):
            # The positions in ledger and spool belong to the last of these rings.
            ring_id = self._hooks.old_ring_id if number == len(rings) else None
            encoder = functools.partial(self._isolator, old)
            with ring:
                lost += drain(old, ring, ring_id or "", encoder, spool, account, UtcOffset()())
        return lost


@contextmanager
def _unavailable(what: str, numbers: frozenset[int]) -> Iterator[None]:
    """Raise UnavailableError for these error numbers: without ledger or spool, their events count as lost."""
    try:
        yield
    except OSError as error:
        if error.errno in numbers:
            raise UnavailableError(f"{what}: {error}") from error
        raise
