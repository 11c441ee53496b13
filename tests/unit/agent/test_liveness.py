"""Heartbeats: one at a time, but the last one in any case."""

import io
from collections import Counter
from typing import Any

import fastavro

from producer.agent.liveness import Liveness
from producer.events import HEARTBEATS, EncodedBatch
from producer.health.board import StatusBoard
from producer.health.heartbeat import HeartbeatEncoder
from producer.schemas import load_schema
from tests.support.statuses import status

FRAME_BYTES = 5


class Sink:
    """Holds all messages in flight."""

    def __init__(self) -> None:
        self.in_flight: Counter[str] = Counter()
        self.states: list[str] = []

    def send(self, batch: EncodedBatch) -> None:
        record: Any = fastavro.schemaless_reader(
            io.BytesIO(batch.packed()[FRAME_BYTES:]), fastavro.parse_schema(load_schema(HEARTBEATS.schema_file)), None
        )
        self.states.append(record["state"])
        self.in_flight[batch.stream.name] += len(batch)


def test_a_stop_is_reported_although_a_heartbeat_is_in_flight() -> None:
    sink: Any = Sink()
    liveness = Liveness(StatusBoard(), HeartbeatEncoder(HEARTBEATS.fixed_schema_id), sink, lambda: status(reasons=()))
    liveness.step()
    liveness.last()
    assert sink.states == ["ok", "stopped"]


def test_a_service_manager_that_is_gone_is_one_warning_per_kind(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("WATCHDOG_USEC", "2")
    sink: Any = Sink()
    liveness = Liveness(StatusBoard(), None, sink, lambda: status(reasons=()))
    for _ in range(3):
        liveness.note()
        liveness.last()
    assert [each.getMessage().partition(": the service")[0] for each in caplog.records] == [
        "systemd: cannot send WATCHDOG=1",
        "systemd: cannot send the status",
    ]
