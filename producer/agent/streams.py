"""Builds a stream: its ring, encoder, spool and ledger, recovered to one consistent state."""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

from producer.backoff import BackOff
from producer.config.load import Config
from producer.encode.batch import BatchEncoder, Key
from producer.encode.isolate import Isolator
from producer.errors import UnavailableError
from producer.events import SchemaId, Stream
from producer.health import metrics
from producer.host.cgroups import CgroupPaths, cgroup2_root
from producer.host.clock import UtcOffset, boot_id
from producer.host.pods import Pods, PodSource
from producer.kernel.capture import Capture
from producer.kernel.ringbuf import Ring
from producer.pipeline.ledger import Account, Ledger
from producer.pipeline.recovery import drain, resume
from producer.pipeline.stream import Stores, StreamPipeline
from producer.schemas import load_schema
from producer.spool.disk import PASSING, UNRELATED
from producer.spool.files import SPOOL_SUFFIX, files
from producer.spool.from_config import ledger_path, new_spool, spool_bytes, spool_folder
from producer.spool.quarantine import Quarantine
from producer.spool.spool import Spool

logger = logging.getLogger(__name__)

_SPOOL_WAIT_S = 5.0


def has_undelivered(config: Config, hooks: Capture, stream: Stream) -> bool:
    """Whether an earlier run has left events of this stream, on disk or in a ring."""
    with _unavailable("spool", UNRELATED):
        on_disk = spool_bytes(config, stream) and files(spool_folder(config, stream), SPOOL_SUFFIX)
    return bool(on_disk) or stream in hooks.old_streams


@dataclass(frozen=True, slots=True)
class StreamParts:
    """The parts of one stream."""

    stream: Stream
    ring: Ring
    spool: Spool | None
    pipeline: StreamPipeline
    open_error: str
    """Why the spool could not be opened; empty if it was, or if none is configured."""


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
        pods = config.kubernetes
        source = PodSource(pods.pods_url, pods.token, pods.ca) if pods.pods_url else None
        self._pods = stack.enter_context(Pods(source)) if source else None
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
        """Encode with these labels of the site from now on."""
        if labels == self._fields["labels"]:
            return
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
