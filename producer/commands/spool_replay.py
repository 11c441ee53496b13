"""Sends the spooled events to Kafka without capturing, or discards them: `rebpf spool replay` and `rebpf spool drop`.

Both take the producer's place: they hold the lock of its state folder and update its ledger, so that the next producer
continues from there, even with the same rings. The ledger is written before files are deleted. An interrupted replay
can be repeated: events that were sent but not yet recorded are sent twice.

The quarantine has no ledger: a file is deleted when all of its messages are acknowledged, and messages that are
rejected again are appended to new files. The producer's account still counts quarantined messages as lost.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from producer.commands.spool_show import disk_errors, quarantined, require_state_folder
from producer.config.librdkafka import client_settings
from producer.config.load import Config
from producer.events import STREAMS, EncodedBatch, Stream, Topic
from producer.host.progress import Progress
from producer.host.signals import Flag
from producer.host.state import StateFolder
from producer.kafka.admin import Admin
from producer.kafka.sink import KafkaSink
from producer.pipeline.account import StreamAccount
from producer.pipeline.ledger import Account, Ledger
from producer.pipeline.recovery import resume_spool
from producer.pipeline.spool_sender import SpoolSender
from producer.spool.files import ASIDE_SUFFIX, SPOOL_SUFFIX, files
from producer.spool.from_config import ledger_path, new_quarantine, new_spool, quarantine_folder
from producer.spool.quarantine import Quarantine
from producer.spool.spool import Spool
from producer.topics import topic

_PAUSE_S = 0.01
_NO_LIMIT_BYTES = 1 << 62
"""Of the quarantine: any of its messages may be rejected again."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The result of a replay for one stream."""

    delivered: int
    waiting: int
    """Events still in the spool or the quarantine."""
    lost: Mapping[str, int]
    """Events lost, by reason. Messages that Kafka rejected are in the quarantine."""
    last_error: str
    """Why events are left, if known."""

    def __str__(self) -> str:
        losses = ",".join(f"{reason}:{count}" for reason, count in self.lost.items()) or "0"
        last_error = f" last_error={self.last_error}" if self.last_error else ""
        return f"delivered={self.delivered} waiting={self.waiting} lost={losses}{last_error}"


class _Source:
    """A stream's open spool or quarantine, and its sender; `write_account` stores the account."""

    def __init__(
        self,
        stream: Stream,
        spool: Spool,
        account: Account | None = None,
        write_account: Callable[[Account], None] = lambda account: None,
    ) -> None:
        spool.open(*((account.acked, account.end, account.discarded) if account else ()))
        self.account = resume_spool(account, spool)
        self._write_account = write_account
        self._counts = StreamAccount(None, spool, write_account, self.account)
        self._delivered, self._lost = self._counts.delivered, self._counts.lost
        self.spool = spool
        self.sender = SpoolSender(stream, spool, self._counts)

    @property
    def done(self) -> int:
        """Number of messages delivered or lost so far."""
        return self._counts.delivered + self._counts.lost.total()

    def is_done(self, sink: KafkaSink) -> bool:
        """Whether all was sent and nothing is in flight."""
        return not self.sender.has_unsent and not sink.in_flight[self.sender.stream.name]

    def result(self, sink: KafkaSink) -> Sent:
        """End the replay and return its result."""
        self._counts.checkpoint()
        last_error = sink.last_error_of(self.sender.stream.name) or (sink.last_error.name if sink.last_error else "")
        if self._counts.ledger_error:
            last_error = f"ledger: {self._counts.ledger_error}"
        delivered, lost = self._counts.delivered - self._delivered, self._counts.lost - self._lost
        waiting = self.spool.pending
        return Sent(delivered, waiting, dict(lost), last_error if waiting else "")

    def discard(self) -> int:
        """Count all spooled events as lost and delete them; return how many there were."""
        spool, count = self.spool, self.spool.pending
        lost = Counter(self.account.lost) + Counter(spool_dropped=count)
        self._write_account(dataclasses.replace(self.account, lost=dict(lost), acked=spool.end, discarded=0))
        spool.acked = spool.sent = spool.end
        spool.discarded = 0
        spool.sweep()
        return count


def replay(config: Config, stop: Flag, *, timeout_s: float, quarantine: bool) -> dict[Topic, Sent]:
    """Send the spooled events, or the quarantined messages, until all are acknowledged; return the results by topic.

    Ends early when `stop` is set or nothing was acknowledged for `timeout_s`. Raises BusyError if a producer is
    running, and UnavailableError if no broker answers; then nothing has changed.
    """
    settings = client_settings(config.kafka.brokers, config.kafka.settings)
    topics = {stream.name: topic(config, stream) for stream in STREAMS}
    with disk_errors(), ExitStack() as stack:
        _take_over(config, stack)
        Admin(config).partitions()
        if quarantine:
            sources = [_Source(stream, new_quarantine(config, stream, _NO_LIMIT_BYTES)) for stream in STREAMS]
            put = _appender(config, stack)
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
        with Progress("replaying events") as progress:
            _send(sources, sink, stop, timeout_s, progress)
        return {topics[source.sender.stream.name]: source.result(sink) for source in sources}


def drop(config: Config) -> dict[Topic, int]:
    """Discard the spooled events; return their number by topic. Raises BusyError if a producer is running."""
    with disk_errors(), ExitStack() as stack:
        _take_over(config, stack)
        return {topic(config, stream): _spool(config, stream, stack).discard() for stream in STREAMS}


def drop_quarantine(config: Config) -> dict[Topic, int]:
    """Delete the quarantine; return its number of messages by topic. Raises BusyError if a producer is running."""
    with disk_errors(), ExitStack() as stack:
        _take_over(config, stack)
        counts = {topic(config, stream): quarantined(config, stream).total() for stream in STREAMS}
        for stream in STREAMS:
            for ending in (SPOOL_SUFFIX, ASIDE_SUFFIX):
                for path in files(quarantine_folder(config, stream), ending):
                    path.unlink()
        return counts


def complaint(sent: Mapping[Topic, Sent]) -> tuple[str | None, str | None]:
    """Return a line on events that are left, and one on events that were lost; None if there are none."""
    waiting = [
        f"{name}: {each.waiting} events not delivered {each.last_error}".rstrip()
        for name, each in sent.items()
        if each.waiting
    ]
    lost = [f"{name}: {sum(each.lost.values())} events lost" for name, each in sent.items() if each.lost]
    return "; ".join(waiting) or None, "; ".join(lost) or None


def _take_over(config: Config, stack: ExitStack) -> None:
    """Take the producer's place: lock its state folder, which must exist."""
    require_state_folder(config)
    stack.enter_context(StateFolder(config.state_dir))


def _spool(config: Config, stream: Stream, stack: ExitStack) -> _Source:
    ledger = Ledger(ledger_path(config, stream))
    account = ledger.read()
    ledger.open()
    stack.callback(ledger.close)
    return _Source(stream, new_spool(config, stream), account, ledger.write)


def _appender(config: Config, stack: ExitStack) -> Callable[[EncodedBatch, str], None]:
    """Return a function that appends messages to the quarantine, in new files that this replay does not read.

    It raises OSError if that fails, so that the messages do not count as done.
    """
    spools = {stream.name: new_quarantine(config, stream, _NO_LIMIT_BYTES) for stream in STREAMS}
    for spool in spools.values():
        spool.open()
        stack.callback(spool.close)

    def put(batch: EncodedBatch, error: str) -> None:
        spools[batch.stream.name].append(batch, "", 0, error)

    return put


def _send(sources: Sequence[_Source], sink: KafkaSink, stop: Flag, timeout_s: float, progress: Progress) -> None:
    senders = {source.sender.stream.name: source.sender for source in sources}
    total = sum(source.spool.pending for source in sources)
    done, deadline_s = 0, time.monotonic() + timeout_s
    while not all(source.is_done(sink) for source in sources) and time.monotonic() < deadline_s and not stop.is_set():
        more = [sender.send(sink, time.monotonic()) for sender in senders.values()]
        for name, outcome in sink.poll().items():
            senders[name].on_reports(outcome)
        if not any(more):
            stop.wait(_PAUSE_S)
        if (now_done := sum(source.done for source in sources)) != done:
            done, deadline_s = now_done, time.monotonic() + timeout_s
            progress(done, total)
