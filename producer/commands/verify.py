"""`rebpf verify`: check topics for missing, duplicate and reordered events."""

import logging
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
from confluent_kafka import Message

from producer.config.load import Registry
from producer.consume.audit import ALL, Audit, BootReport
from producer.consume.decode import Decoder
from producer.consume.event_id import read_events
from producer.consume.reader import TopicReader
from producer.host.progress import Progress
from producer.host.text import lines as as_lines
from producer.host.text import to_json

logger = logging.getLogger(__name__)
_REASONS = 10


@dataclass(frozen=True, slots=True)
class TopicReport:
    """The audit of a topic."""

    topic: str
    partitions: int
    messages: int
    other_hosts: int
    """Messages of hosts other than the requested one."""
    undecodable: int
    flows_forgotten: int
    """Flows that were forgotten because there are too many: their order is not checked across a pause."""
    boots: tuple[BootReport, ...]
    unchecked: int = 0
    """Events beyond the memory limits: whether more are missing is unknown."""

    def faults(self) -> dict[str, int]:
        """Return the faults found, with their counts."""
        counts = {
            "missing": sum(boot.missing for boot in self.boots),
            "restarts": sum(boot.restarts for boot in self.boots),
            "out_of_order": sum(boot.out_of_order for boot in self.boots),
            "undecodable": self.undecodable,
            "unchecked": self.unchecked,
        }
        return {name: count for name, count in counts.items() if count}

    def __str__(self) -> str:
        lines = [_line(self.topic, boot) for boot in self.boots]
        counts = {"partitions": self.partitions, "messages": self.messages, "undecodable": self.undecodable}
        if self.flows_forgotten:
            counts["flows_forgotten"] = self.flows_forgotten
        found = [f"{name}={count}" for name, count in (counts | self.faults()).items()]
        return as_lines([*lines, " ".join([self.topic, *found, *([] if self.faults() else ["complete"])])])


class _TopicCount:
    """Passes the messages of one topic to its audit."""

    def __init__(self, topic: str, complete_from_ms: float, decoder: Decoder, host: str | None) -> None:
        self.audit = Audit(complete_from_ms)
        self._topic = topic
        self._needs_timestamps = complete_from_ms != ALL
        self._decoder = decoder
        self._host = host
        self._messages = self._other_hosts = self._undecodable = 0
        self._reasons: set[str] = set()

    def add(self, messages: Sequence[Message]) -> None:
        self._messages += len(messages)
        events, rejected = read_events(self._decoder, list(map(Message.value, messages)))
        for row, reason in rejected:
            self._reject(messages[row], reason)
        if self._host is not None:
            is_host = np.array([text == self._host for text in events.texts], np.bool_)
            of_host = is_host[events["host"]] if len(events) else np.empty(0, np.bool_)
            self._other_hosts += int(np.count_nonzero(~of_host))
            events = events.select(of_host)
        partitions = np.array(list(map(Message.partition, messages)), np.int64)[events.rows]
        sent_ms = np.zeros(len(events), np.int64)
        if self._needs_timestamps:
            sent_ms = np.array([at for _, at in map(Message.timestamp, messages)], np.int64)[events.rows]
        self.audit.add(events.plus(partition=partitions, sent_ms=sent_ms))

    def report(self, partitions: int) -> TopicReport:
        return TopicReport(
            self._topic,
            partitions,
            self._messages,
            self._other_hosts,
            self._undecodable,
            self.audit.flows_forgotten,
            tuple(self.audit.boots()),
            self.audit.unchecked,
        )

    def _reject(self, message: Message, reason: str) -> None:
        self._undecodable += 1
        if reason not in self._reasons and len(self._reasons) < _REASONS:
            self._reasons.add(reason)
            logger.warning(
                "undecodable topic=%s partition=%d offset=%d: %s",
                self._topic, message.partition(), message.offset(), reason,
            )  # fmt: skip


def verify(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | None,
    host: str | None,
    since: int | None,
    client_settings: Mapping[str, str],
) -> list[TopicReport]:
    """Read the topics and report on each.

    `host`: only this one. `since`: start at this offset of each partition, or, if negative, this many before its end.
    """
    decoder = Decoder(registry)
    with closing(TopicReader(brokers, topics, client_settings, since)) as reader:
        counts = {topic: _TopicCount(topic, reader.complete_from_ms(topic), decoder, host) for topic in topics}
        with Progress("verifying messages") as progress:
            for batch in reader.batches(progress):
                for topic, messages in batch.items():
                    counts[topic].add(messages)
    partitions = Counter(partition.topic for partition in reader.spans)
    return [count.report(partitions[topic]) for topic, count in counts.items()]


def show(reports: Sequence[TopicReport], *, as_json: bool, width: int | None = None) -> str:
    """Return the reports as text, whose lines are wrapped between fields if there is a width, or as one JSON object."""
    if as_json:
        return to_json({report.topic: asdict(report) for report in reports}, compact=True)
    text = "\n".join(map(str, reports))
    if width is None:
        return text
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrapper.fill, text.splitlines()))


def fault_summary(reports: Sequence[TopicReport]) -> str | None:
    """Return the faults in one line; None if there are none."""
    faults = [
        f"{report.topic}: " + ", ".join(f"{name} {count}" for name, count in report.faults().items())
        for report in reports
        if report.faults()
    ]
    return "; ".join(faults) or None


def _line(topic: str, boot: BootReport) -> str:
    text = (
        f"{topic} host={boot.host} boot={boot.boot_id} first={_time(boot.first_ns)} last={_time(boot.last_ns)} "
        f"events={boot.events} duplicates={boot.duplicates} gaps={boot.gaps} missing={boot.missing} "
        f"restarts={boot.restarts} out_of_order={boot.out_of_order}"
    )
    if boot.perhaps_deleted:
        text += f" perhaps_deleted={boot.perhaps_deleted}"
    if boot.first_numbers:
        text += " first_numbers=" + ",".join(f"{cpu}:{number}" for cpu, number in boot.first_numbers.items())
    return text


def _time(ns: int) -> str:
    return f"{np.datetime64(ns // 1_000_000, 'ms')}Z"
