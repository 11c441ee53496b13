"""Hostile messages for `rebpf alert`, `verify`, `tail`, `top` and `export`: the real decoder, engine and reports."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from producer.alert.alertmanager import Alertmanager
from producer.alert.engine import Engine
from producer.alert.last_alerts import last_of
from producer.alert.model import Alert, Counts
from producer.alert.record import AlertEncoder, as_json_object
from producer.alert.silence import Hosts
from producer.alert.windows import Room
from producer.cli.view import GROUPS
from producer.commands.verify import TopicReport, show
from producer.config.load import AlertRule
from producer.consume.audit import Audit
from producer.consume.decode import Decoder
from producer.consume.event_id import read_events
from producer.events import ALERTS, FLOWS, HEARTBEATS, RETRANSMITS, STREAMS
from producer.export.arrow import batch_of, schema_of
from producer.health.heartbeat import HeartbeatEncoder
from producer.view import table as view
from producer.view.flows import Flows
from producer.view.line import Lines
from producer.view.records import Records, stream_of
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import mutated
from tests.support import spool_folders
from tests.support.flows import Flow, values
from tests.support.statuses import status

_SECOND_NS = 1_000_000_000
_NOW_NS = 1_790_000_000 * _SECOND_NS
_RULES = (
    AlertRule(name="many", by="host", measure="count", window_s=10, threshold=1, clear=1),
    AlertRule(name="loss", by="flow", measure="ratio", window_s=5, threshold=0.5, clear=0.2),
    AlertRule(name="port", by="port", measure="failed_connects", window_s=5, threshold=1, clear=1),
    AlertRule(name="slow", by="subnet", measure="srtt", window_s=5, threshold=0.1, clear=0.1, only_labels={"a": "b"}),
)
_ALERT = Alert("many", "host", "a", True, "count", 9.0, 1.0, 1.0, 10 * _SECOND_NS, 10.0, 0, 9, 10 * _SECOND_NS)


@contextlib.contextmanager
def _alert() -> Iterator[Check]:
    """Each message is processed or counted, and the member continues. It can read the alerts that it writes."""
    encoder = AlertEncoder(ALERTS.fixed_schema_id)
    manager = Alertmanager("http://127.0.0.1", 60, lambda _: None)

    def check(example: tuple[list[tuple[bytes, bytes | None]], list[tuple[int, bytes | None]]]) -> None:
        alerts, messages = example
        counts = Counts()
        known = last_of([alerts], "alerts", Decoder(None), _NOW_NS)
        room = Room(group_count=20, flows=20, samples=20)
        engine = Engine(_RULES, known, _NOW_NS - 100 * _SECOND_NS, 0, Decoder(None), counts, Hosts(3, []), room)
        for offset, (which, value) in enumerate(messages):
            if which == 2:
                engine.put_beats([value], [offset], _NOW_NS)
            else:
                engine.put((FLOWS, RETRANSMITS)[which], [value], _NOW_NS)
        for at_s in (-200, 5, 20, 100):
            at_ns = _NOW_NS + at_s * _SECOND_NS
            for alert in [*engine.decide(at_ns, at_ns), *engine.firing]:
                if not last_of([[encoder.encode(alert, 0.0)]], "alerts", Decoder(None), 1 << 62):
                    raise FindingError(f"an alert that a member does not believe: {alert}")
                json.dumps([as_json_object(alert), manager._payload(alert)], allow_nan=False)
        if counts.read + counts.undecodable < sum(which != 2 for which, _ in messages):
            raise FindingError(f"messages that are not counted: {counts}")

    yield check


@contextlib.contextmanager
def _verify() -> Iterator[Check]:
    """Each message is a row of the audit or undecodable, and there is a report."""

    def check(values: list[bytes | None]) -> None:
        audit = Audit()
        events, rejected = read_events(Decoder(None), values)
        none = np.zeros(len(events), np.int64)
        audit.add(events.plus(partition=none, sent_ms=none))
        report = TopicReport("topic", 1, len(values), 0, len(rejected), audit.flows_forgotten, tuple(audit.boots()))
        json.loads(show([report], as_json=True))
        if len(show([report], as_json=False).splitlines()) != 1 + len(report.boots):
            raise FindingError("more lines than boots")

    yield check


@contextlib.contextmanager
def _views() -> Iterator[Check]:
    """Each message is shown, counted and exported, or undecodable."""

    def check(values: list[bytes | None]) -> None:
        flows, lines = Flows(0), Lines(200, hosts=True, color=False, connections=True)
        for _, table in Decoder(None).tables(values)[0]:
            if (stream := stream_of(table.plan.names)) is None:
                continue
            records = Records.from_table(stream, table)
            flows.add(records, 1.0)
            shown = "\n".join(lines.lines(records.rows())).split("\n")  # a new day has a line
            if not all(map(str.isprintable, shown)):
                raise FindingError("a line that a terminal obeys")
            if batch_of(schema_of(stream), table, table.status == 0).num_rows != len(records):
                raise FindingError("events that are not exported")
        for by in GROUPS:
            for line in view.table(flows, by, "retransmitted", 1.0, 5.0, 20).lines:
                json.dumps(line.as_dict())
                view.details(flows, by, line.name, 1.0, 20)
        flows.forget(1000.0)

    yield check


def _events() -> tuple[bytes, ...]:
    found = []
    for stream in STREAMS:
        encoded = spool_folders.encoded(stream, 1, 2)
        found.append(encoded.payload[: int(encoded.lengths[0])].tobytes())
    return tuple(found)


_EVENTS = _events()
_FLOWS = tuple(
    values(
        [
            Flow("a", 1, 1_790_000_000_000, 1_789_999_999_000, 100, {"rto": 60}, srtt_us=200_000),
            Flow("a", 2, 1_790_000_000_000, None, 3, state="SYN_SENT", close=True, error="ETIMEDOUT"),
        ]
    )
)
_BEAT = HeartbeatEncoder(HEARTBEATS.fixed_schema_id).encode(status(), 100)[1]
_ODD = [replace(_ALERT, labels=text, annotations=text) for text in ("{}", "[]", '{"a":1}', "")]
_TOLD = [AlertEncoder(ALERTS.fixed_schema_id).encode(alert, 100) for alert in _ODD]
_message = st.one_of(
    st.tuples(st.just(0), mutated(_FLOWS)),
    st.tuples(st.just(1), mutated(_EVENTS)),
    st.tuples(st.just(2), mutated([_BEAT])),
    st.tuples(st.integers(0, 2), st.one_of(st.none(), mutated([*_EVENTS, *_FLOWS, _BEAT, _TOLD[0][1]]))),
)
_alerts = st.lists(
    st.tuples(
        st.sampled_from((_TOLD[0][0], b"", b"x" * 9)),
        st.one_of(st.none(), mutated([*(value for _, value in _TOLD), _BEAT])),
    ),
    max_size=3,
)

TARGETS = (
    Target("alert", st.tuples(_alerts, st.lists(_message, max_size=8)), _alert, 100),
    Target("views", st.lists(st.one_of(mutated([*_EVENTS, *_FLOWS]), st.none()), max_size=8), _views, 100),
    Target("verify", st.lists(st.one_of(mutated(_EVENTS), st.none()), max_size=8), _verify, 150),
)
