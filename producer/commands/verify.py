"""`rebpf verify`: check topics for missing, duplicate and reordered events."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from confluent_kafka import Message

from producer.config.load import Registry
from producer.consume.audit import Audit, BootReport, Row
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.event_id import EventIdReader
from producer.consume.reader import TopicReader
from producer.host.text import lines as as_lines
from producer.host.text import to_json

_LOG = logging.getLogger(__name__)
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

    def as_dict(self) -> dict[str, Any]:
        """Return the report as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [_line(self.topic, boot) for boot in self.boots]
        forgotten = f" flows_forgotten={self.flows_forgotten}" if self.flows_forgotten else ""
        lines.append(
            f"{self.topic} partitions={self.partitions} messages={self.messages} undecodable={self.undecodable}"
            f"{forgotten} " + (" ".join(f"{name}={count}" for name, count in self.faults().items()) or "complete")
        )
        return as_lines(lines)


class _TopicCount:
    """Passes the messages of one topic to its audit."""

    def __init__(self, topic: str, complete_from_ms: float, id_reader: EventIdReader, host: str | None) -> None:
        self.audit = Audit(complete_from_ms)
        self._topic = topic
        self._id_reader = id_reader
        self._host = host
        self._messages = self._other_hosts = self._undecodable = 0
        self._reasons: set[str] = set()

    def add(self, messages: Sequence[Message]) -> None:
        self._messages += len(messages)
        self.audit.add(list(self._rows(messages)))

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

    def _rows(self, messages: Sequence[Message]) -> Iterator[Row]:
        for message in messages:
            try:
                event_id = self._id_reader.read(message.value())
            except UndecodableError as exc:
                self._reject(message, str(exc))
                continue
            host = event_id["host"]
            if self._host is not None and host != self._host:
                self._other_hosts += 1
                continue
            yield Row(
                message.partition() or 0, message.key(), message.timestamp()[1],
                event_id["ts_ns"], host, event_id["boot_id"], event_id["cpu"], event_id["cpu_seq"],
            )  # fmt: skip

    def _reject(self, message: Message, reason: str) -> None:
        self._undecodable += 1
        if reason not in self._reasons and len(self._reasons) < _REASONS:
            self._reasons.add(reason)
            _LOG.warning(
                "undecodable topic=%s partition=%d offset=%d: %s",
                self._topic, message.partition(), message.offset(), reason,
            )  # fmt: skip


def verify(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | str | None,
    host: str | None,
    since: int | None,
    client_settings: Mapping[str, str],
) -> list[TopicReport]:
    """Read the topics and report on each.

    `host`: only this one. `since`: start at this offset of each partition, or, if negative, this many before its end.
    """
    id_reader = EventIdReader(Decoder(registry))
    reader = TopicReader(brokers, topics, client_settings, since)
    try:
        counts = {topic: _TopicCount(topic, reader.complete_from_ms(topic), id_reader, host) for topic in topics}
        for batch in reader.batches():
            for topic, count in counts.items():
                count.add([message for message in batch if message.topic() == topic])
    finally:
        reader.close()
    return [
        count.report(sum(partition.topic == topic for partition in reader.spans)) for topic, count in counts.items()
    ]


def show(reports: Sequence[TopicReport], *, as_json: bool) -> str:
    """Return the reports as text, or as one JSON object."""
    if as_json:
        return to_json({report.topic: report.as_dict() for report in reports}, compact=True)
    return "\n".join(map(str, reports))


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
    return f"{np.datetime64(ns, 'ns')}Z"
