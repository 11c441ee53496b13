"""What waits on disk, sent to Kafka without a capture, or given up: `rebpf spool replay` and `rebpf spool drop`.

Both stand in for the producer: they hold the lock of its state folder, and keep its ledger, so that the next producer
goes on from there, be it with the same rings. What the ledger says is written first, and then files go. Who is
interrupted can begin again: what was sent and not yet noted is sent twice.

The quarantine has no ledger: there a file goes when all of it is acknowledged, and what is refused again is written
behind the rest. In the account of the producer its messages stay lost.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from producer.agent.streams import Quarantine, ledger_path, new_spool, quarantine_folder
from producer.backoff import BackOff
from producer.commands.spool_show import disk_errors, quarantined, require_state_folder
from producer.config.librdkafka import client_settings
from producer.config.load import Config
from producer.events import STREAMS, Batch, EncodedBatch, Rows, Stream, Topic
from producer.host.clock import now
from producer.host.signals import Flag
from producer.host.state import StateFolder
from producer.kafka.admin import Admin
from producer.kafka.sink import KafkaSink
from producer.pipeline.ledger import Account, Ledger
from producer.pipeline.pipeline import Pipeline
from producer.pipeline.stream import Stores, StreamPath, resume
from producer.schemas import load_schema
from producer.spool.files import ASIDE, SEGMENT, files
from producer.spool.spool import Spool
from producer.topics import topic

_PAUSE_S = 0.01
_NO_LIMIT_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a stream's events that waited."""

    delivered: int
    waiting: int
    """Events that wait still, or again."""
    lost: Mapping[str, int]
    """Events lost, by reason; what Kafka refuses is in the quarantine."""
    trouble: str
    """Why events wait still, as far as is known."""

    def __str__(self) -> str:
        losses = ",".join(f"{reason}:{count}" for reason, count in self.lost.items()) or "0"
        trouble = f" trouble={self.trouble}" if self.trouble else ""
        return f"delivered={self.delivered} waiting={self.waiting} lost={losses}{trouble}"


class _NoRing:
    """Stands for a ring and an encoder where nothing is captured; the ring's position is kept for who has the ring."""

    records_before = 0
    damaged = 0
    fill = 0.0

    def __init__(self, stream: Stream, position: int) -> None:
        self._none = np.zeros(0, stream.dtype)
        self.position = position

    def read(self, limit: int) -> Rows:
        return self._none

    def holds(self, position: int) -> bool:
        return True

    def commit(self, position: int) -> None:
        pass

    def fit(self, rows: Rows) -> int:
        return len(rows)

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        raise AssertionError("nothing is captured")


class _Source:
    """A stream's spool or quarantine, opened, and its way to Kafka; `write_account` keeps what outlives a replay."""

    def __init__(
        self, stream: Stream, spool: Spool, account: Account | None, write_account: Callable[[Account], None]
    ) -> None:
        spool.open(*((account.acked, account.end, account.gone) if account else ()))
        before = account or Account()
        ring = _NoRing(stream, before.position)
        self.stream = stream
        self.spool = spool
        self.account = resume(before, before.ring, ring, spool, spool.last)
        self.path = StreamPath(
            stream, ring, ring, Stores(spool, write_account, BackOff("spool"), math.inf), self.account
        )
        self._write_account = write_account
        self._delivered, self._lost = self.path.delivered, self.path.lost

    @property
    def waiting(self) -> int:
        """Events that are not done."""
        return self.spool.end - self.spool.acked - self.spool.gone

    @property
    def settled(self) -> int:
        """A number that goes up with each message of which something has become."""
        return self.path.delivered + self.path.lost.total()

    def is_done(self, sink: KafkaSink) -> bool:
        """Say whether all was sent and nothing is under way."""
        return self.spool.sent == self.spool.end and not sink.in_flight[self.stream.name]

    def result(self, sink: KafkaSink) -> Sent:
        """Return what became of it all."""
        self.path.end(sink, 0, ring_stays=True)
        trouble = sink.last_error_of(self.stream.name) or (sink.last_error.name if sink.last_error else "")
        if self.path.ledger_trouble:
            trouble = f"ledger: {self.path.ledger_trouble}"
        delivered, lost = self.path.delivered - self._delivered, self.path.lost - self._lost
        return Sent(delivered, self.waiting, dict(lost), trouble if self.waiting else "")

    def give_up(self) -> int:
        """Count all that waits as lost, and delete it; return how much that is."""
        spool, count = self.spool, self.waiting
        lost = Counter(self.account.lost) + Counter(spool_dropped=count)
        self._write_account(dataclasses.replace(self.account, lost=dict(lost), acked=spool.end, gone=0))
        spool.acked = spool.sent = spool.end
        spool.gone = 0
        spool.sweep()
        return count


def replay(config: Config, stop: Flag, *, timeout_s: float, quarantine: bool) -> dict[Topic, Sent]:
    """Send what waits, or else what is in the quarantine, until it is acknowledged; return what became of it by topic.

    It ends early when `stop` is set, and when nothing was acknowledged for `timeout_s`. BusyError where a producer
    runs, UnavailableError where no broker answers: then nothing has changed.
    """
    settings = client_settings(config.kafka.brokers, config.kafka.settings)
    topics = {stream.name: topic(config, stream) for stream in STREAMS}
    with disk_errors(), ExitStack() as stack:
        _stand_in(config, stack)
        Admin(config).partitions()
        if quarantine:
            sources = [_Source(stream, _quarantine(config, stream), None, lambda account: None) for stream in STREAMS]
            put = _put_behind(config, stack)
        else:
            sources = [_spool(config, stream, stack) for stream in STREAMS]
            kept = Quarantine(config)
            stack.callback(kept.close)
            put = kept.put
        for source in sources:
            stack.callback(source.spool.close)
        sink = KafkaSink(settings, topics, quarantine=put)
        sink.open()
        stack.callback(sink.close)
        _send(sources, sink, stop, timeout_s)
        return {topics[source.stream.name]: source.result(sink) for source in sources}


def drop(config: Config) -> dict[Topic, int]:
    """Give up what waits; return the number of events by topic. BusyError where a producer runs."""
    with disk_errors(), ExitStack() as stack:
        _stand_in(config, stack)
        return {topic(config, stream): _spool(config, stream, stack).give_up() for stream in STREAMS}


def drop_quarantine(config: Config) -> dict[Topic, int]:
    """Delete what is in the quarantine; return the number of messages by topic. BusyError where a producer runs."""
    with disk_errors(), ExitStack() as stack:
        _stand_in(config, stack)
        counts = {topic(config, stream): quarantined(config, stream).total() for stream in STREAMS}
        for stream in STREAMS:
            for ending in (SEGMENT, ASIDE):
                for path in files(quarantine_folder(config, stream), ending):
                    path.unlink()
        return counts


def complaint(sent: Mapping[Topic, Sent]) -> tuple[str | None, str | None]:
    """Return what waits still, and what is lost, in a line each; None where nothing is."""
    waiting = [
        f"{name}: {each.waiting} events wait {each.trouble}".rstrip() for name, each in sent.items() if each.waiting
    ]
    lost = [f"{name}: {sum(each.lost.values())} events lost" for name, each in sent.items() if each.lost]
    return "; ".join(waiting) or None, "; ".join(lost) or None


def _stand_in(config: Config, stack: ExitStack) -> None:
    """Take the producer's place, where there has been one."""
    require_state_folder(config)
    stack.enter_context(StateFolder(config.state_dir))


def _spool(config: Config, stream: Stream, stack: ExitStack) -> _Source:
    ledger = Ledger(ledger_path(config, stream))
    account = ledger.read()
    ledger.open()
    stack.callback(ledger.close)
    return _Source(stream, new_spool(config, stream), account, ledger.write)


def _quarantine(config: Config, stream: Stream) -> Spool:
    """Return a stream's quarantine, not yet opened; what was in it may come back, however much that is."""
    return Spool(
        quarantine_folder(config, stream), stream, load_schema(stream.schema_file), now, max_bytes=_NO_LIMIT_BYTES
    )


def _put_behind(config: Config, stack: ExitStack) -> Callable[[EncodedBatch, str], None]:
    """Return what writes messages behind those that are in the quarantine now, in files that a replay does not read.

    OSError where that cannot be: then they must not be taken for done.
    """
    spools = {stream.name: _quarantine(config, stream) for stream in STREAMS}
    for spool in spools.values():
        spool.open()
        stack.callback(spool.close)

    def put(batch: EncodedBatch, error: str) -> None:
        spools[batch.stream.name].append(batch, "", 0, error)

    return put


def _send(sources: Sequence[_Source], sink: KafkaSink, stop: Flag, timeout_s: float) -> None:
    pipeline = Pipeline([source.path for source in sources], sink, time.monotonic, lambda: 0)
    settled, give_up_at = 0, time.monotonic() + timeout_s
    while not all(source.is_done(sink) for source in sources) and time.monotonic() < give_up_at and not stop.is_set():
        if not pipeline.step():
            stop.wait(_PAUSE_S)
        if (now_settled := sum(source.settled for source in sources)) != settled:
            settled, give_up_at = now_settled, time.monotonic() + timeout_s
