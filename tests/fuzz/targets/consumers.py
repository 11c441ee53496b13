"""Hostile messages for `rebpf alert` and `rebpf verify`: the real decoder, stages and reports."""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from hypothesis import strategies as st

from producer.alert import sums_topic
from producer.alert.commit import Assigned, CommitStep, PartitionId
from producer.alert.evaluate import RETRANSMITS
from producer.alert.last_alerts import last_of
from producer.alert.model import Alert
from producer.alert.partitions import Committed, Counts, EventPartition, HeartbeatPartition, Partition, SumsPartition
from producer.alert.record import AlertEncoder
from producer.alert.windows import Grouping, Sums
from producer.commands.verify import TopicReport, show
from producer.config.load import AlertRule
from producer.consume.audit import Audit
from producer.consume.decode import Decoder
from producer.consume.event_id import read_events, rows_of
from producer.events import STREAMS
from producer.health.heartbeat import HeartbeatEncoder
from producer.schemas import ALERT_FILE, ALERT_ID, HEARTBEAT_FILE, HEARTBEAT_ID, load_schema
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import NUMBERS, mutated, mutated_json
from tests.support import spool_folders
from tests.support.statuses import status

_SECOND_NS = 1_000_000_000
_NOW_NS = 1_790_000_000 * _SECOND_NS
_RULES = (
    AlertRule(name="many", by="host", measure="count", window_s=10, threshold=1, clear=1),
    AlertRule(name="loss", by="flow", measure="ratio", window_s=5, threshold=0.5, clear=0.2),
    AlertRule(name="port", by="port", measure="count", window_s=5, threshold=1, clear=1),
)
_ALERT = Alert("many", "host", "a", True, "count", 9.0, 1.0, 1.0, 10 * _SECOND_NS, 10.0, 0, 9, 10 * _SECOND_NS)
_MEMORY_BYTES = 20_000


class _Tellers:
    """A writer and a sink that encode like the real ones."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self._encoder = AlertEncoder(ALERT_ID)

    def put(self, partition: int, value: bytes) -> None:
        sums_topic.read(value)
        self.written.append(value)

    def flush(self) -> None: ...

    def send(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            key, value = self._encoder.encode(alert, 0.0)
            if not last_of([[(key, value)]], "alerts", _decoder(), 1 << 62):
                raise FindingError(f"an alert that a member does not believe: {alert}")

    def repeat(self, firing: Collection[Alert]) -> None:
        self.send(list(firing))

    def close(self) -> None: ...


def _decoder() -> Decoder:
    return Decoder(None, {HEARTBEAT_ID: load_schema(HEARTBEAT_FILE), ALERT_ID: load_schema(ALERT_FILE)})


def _parts(committed: Committed, known: Sequence[Alert], counts: Counts) -> dict[PartitionId, Partition]:
    decoder = _decoder()
    return {
        PartitionId("events", 0): EventPartition(
            "events", RETRANSMITS, "events/0", _RULES, 5, committed, decoder, counts, _MEMORY_BYTES
        ),
        PartitionId("sums", 0): SumsPartition("sums", _RULES, ["events/0"], known, committed, counts, _MEMORY_BYTES),
        PartitionId("hosts", 0): HeartbeatPartition("hosts", 3, [], committed, decoder, counts),
    }


@contextlib.contextmanager
def _alert() -> Iterator[Check]:
    """Each message is processed or counted, and the member continues. It can read what it writes and commits."""

    def check(example: tuple[str, list[tuple[bytes, bytes | None]], list[tuple[int, bytes | None]]]) -> None:
        metadata, alerts, messages = example
        counts = Counts()
        known = last_of([alerts], "alerts", _decoder(), _NOW_NS)
        parts = _parts(Committed(0, metadata, _NOW_NS), known, counts)
        tellers = _Tellers()
        committed: list[Committed] = []

        def commit(done: Assigned) -> None:
            committed.extend(part.committed() for part in done.values())

        cycle = CommitStep(tellers, 1, [tellers], commit)
        places = list(parts)
        for offset, (which, value) in enumerate(messages):
            parts[places[which]].put([value], np.array([offset]), _NOW_NS + offset * _SECOND_NS)
        for at_s in (5, 20, 100):
            for part in parts.values():
                part.until = (part.next, _NOW_NS + at_s * _SECOND_NS)
            cycle.run(parts)
            cycle.repeat(parts)
            offsets = [len(messages) + at_s] * len(tellers.written)
            parts[PartitionId("sums", 0)].put(
                list(tellers.written), np.array(offsets, np.int64), _NOW_NS + at_s * _SECOND_NS
            )
            tellers.written.clear()
        for each in committed:
            facts = each.facts()
            if each.offset < 0 or facts != json.loads(each.metadata):
                raise FindingError(f"committed {each}")

    yield check


@contextlib.contextmanager
def _verify() -> Iterator[Check]:
    """Each message is a row of the audit or undecodable, and there is a report."""

    def check(values: list[bytes | None]) -> None:
        audit = Audit()
        events, rejected = read_events(Decoder(None), values)
        none = np.zeros(len(events), np.int64)
        audit.add(rows_of(events, none, none))
        report = TopicReport("topic", 1, len(values), 0, len(rejected), audit.flows_forgotten, tuple(audit.boots()))
        json.loads(show([report], as_json=True))
        if len(show([report], as_json=False).splitlines()) != 1 + len(report.boots):
            raise FindingError("more lines than boots")

    yield check


def _events() -> tuple[bytes, ...]:
    found = []
    for stream in STREAMS:
        encoded = spool_folders.encoded(stream, 1, 2)
        found.append(encoded.payload[: int(encoded.lengths[0])].tobytes())
    return tuple(found)


def _sums() -> tuple[bytes, ...]:
    start_ns = _NOW_NS - _NOW_NS % (10 * _SECOND_NS)
    sums = Sums(Grouping("host", 10 * _SECOND_NS), start_ns, {"a": 9, "b": 1})
    ((_, value),) = sums_topic.sums_messages(RETRANSMITS, "events/0", sums, 1)
    return value, sums_topic.watermark_message("events/0", _NOW_NS)


_EVENTS, _SUMS = _events(), _sums()
_BEAT = HeartbeatEncoder(HEARTBEAT_ID).encode(status(), 100)[1]
_TOLD = AlertEncoder(ALERT_ID).encode(_ALERT, 100)
_DEEP = st.integers(1, 100_000).map(lambda depth: b"[" * depth)
_sums_values = st.one_of(
    mutated(_SUMS),
    mutated_json([json.loads(value) for value in _SUMS]).map(lambda value: json.dumps(value).encode()),
    _DEEP,
)
_message = st.one_of(
    st.tuples(st.just(0), mutated(_EVENTS)),
    st.tuples(st.just(1), _sums_values),
    st.tuples(st.just(2), mutated([_BEAT])),
    st.tuples(st.integers(0, 2), st.one_of(st.none(), mutated([*_EVENTS, *_SUMS, _BEAT, _TOLD[1]]))),
)
_numbers = st.sampled_from((*NUMBERS, math.nan, _NOW_NS, None, "5"))
_metadata = st.one_of(
    st.just(""),
    st.tuples(_numbers, _numbers, _numbers).map(
        lambda facts: json.dumps(dict(zip(("watermark_ns", "decided_ns", "next"), facts, strict=True)))
    ),
    st.integers(1, 4096).map(lambda depth: "[" * depth),
    st.text(max_size=20),
)
_alerts = st.lists(
    st.tuples(st.sampled_from((_TOLD[0], b"", b"x" * 9)), st.one_of(st.none(), mutated([_TOLD[1], _BEAT]))), max_size=3
)

TARGETS = (
    Target("alert", st.tuples(_metadata, _alerts, st.lists(_message, max_size=8)), _alert, 100),
    Target("verify", st.lists(st.one_of(mutated(_EVENTS), st.none()), max_size=8), _verify, 150),
)
