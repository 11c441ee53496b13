"""Alerts as text, records and requests to Alertmanager, against a fake server."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from producer.alert.alertmanager import Alertmanager, Webhook
from producer.alert.model import Alert
from producer.alert.record import AlertEncoder, summary
from producer.alert.sinks import StandardOutput
from producer.errors import Stopped
from producer.events import ALERTS, HEARTBEATS, STREAMS
from producer.schemas import load_schema
from tests.support.alerts import COUNT, LOSS, SILENT
from tests.support.documents import DOCS, FIELD, type_of
from tests.support.servers.consume import decode


@pytest.mark.parametrize(
    ("alert", "words"),
    [
        (LOSS, "host web-1: 6.25% of 16000 segments were retransmitted in 60 s (loss fires from 5.00%, "),
        (replace(LOSS, firing=False), "host web-1 is resolved: 6.25% of 16000 segments"),
        (COUNT, "peer 192.0.2.1: 1000 segments were retransmitted in 60 s (many fires from 5, resolves below 2)"),
        (
            replace(LOSS, measure="failed_connects", value=7.0, threshold=5.0, causes="ETIMEDOUT=7", hosts="a=7"),
            "host web-1: 7 connects failed in 60 s (loss fires from 5, resolves below 0.02); causes ETIMEDOUT=7; hosts",
        ),
        (
            replace(LOSS, measure="failed_connects", value=1_234_567.0, threshold=1_000_001.0, clear=0.5),
            "host web-1: 1234567 connects failed in 60 s (loss fires from 1000001, resolves below 0.5)",
        ),
        (replace(LOSS, measure="srtt", value=0.25), "host web-1: the round-trip time was 0.25 s in 60 s, of 16000 "),
        (SILENT, "host web-1 is silent: no heartbeat for 31 s"),
        (replace(SILENT, firing=False), "host web-1 is heard again"),
    ],
)
def test_an_alert_in_words(alert: Alert, words: str) -> None:
    assert summary(alert).startswith(words)


def test_a_record_says_what_the_alert_does() -> None:
    key, value = AlertEncoder(ALERTS.fixed_schema_id).encode(LOSS, 1_790_000_123.456)
    number, record = decode(value, load_schema(ALERTS.schema_file))
    assert key == b"loss/web-1"
    assert number == ALERTS.fixed_schema_id
    assert record.pop("ts") == datetime.fromtimestamp(1_790_000_123.456, UTC)
    assert record.pop("summary") == summary(LOSS)
    assert Alert(**record) == LOSS


def test_events_md_has_every_field_of_the_alert_as_it_is() -> None:
    section = (DOCS / "events.md").read_text().split("\n### TcpAlert\n")[1].split("\n#")[0]
    rows = [(name, kind, text) for name, kind, text, _ in FIELD.findall(section)]
    assert rows == [
        (field["name"], type_of(field), field["doc"]) for field in load_schema(ALERTS.schema_file)["fields"]
    ]


def test_no_two_records_have_one_fixed_id() -> None:
    ids = {ALERTS.fixed_schema_id, HEARTBEATS.fixed_schema_id, *(stream.fixed_schema_id for stream in STREAMS)}
    assert len(ids) == len(STREAMS) + 2


def test_standard_output_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    StandardOutput(as_json=False).send([LOSS, replace(LOSS, firing=False)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"FIRING {summary(LOSS)}"
    assert second.startswith("RESOLVED host web-1 is resolved: ")
    StandardOutput(as_json=True).send([COUNT])
    record = json.loads(capsys.readouterr().out)
    assert record.pop("summary") == summary(COUNT)
    assert record.pop("labels") == {"team": "net"}
    assert record.pop("annotations") == {}
    assert record == {name: getattr(COUNT, name) for name in record}


class Receiver:
    """Records posts, and answers with the statuses of `answers` in turn, then with 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.headers: dict[str, str] = {}
        self.posted: list[list[dict[str, Any]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.posted.append(body)
                status = receiver.answers.pop(0) if receiver.answers else 200
                self.send_response(status)
                for name, value in receiver.headers.items() if status != 200 else ():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if status == 200 else b"why")

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.02,))
    thread.start()
    yield receiver
    receiver.server.shutdown()
    thread.join()
    receiver.server.server_close()


def test_firing_alerts_end_later_and_resolved_ones_have_ended(receiver: Receiver) -> None:
    before = datetime.now(UTC)
    Alertmanager(receiver.url + "/", 60, pytest.fail).send([LOSS, replace(COUNT, firing=False)])
    firing, resolved = receiver.posted[0]
    after = datetime.now(UTC)

    assert firing["labels"] == {"alertname": "loss", "by": "host", "group": "web-1", "host": "web-1"}
    own = {"alertname": "many", "by": "peer", "group": "192.0.2.1", "peer": "192.0.2.1"}
    assert resolved["labels"] == {**own, "team": "net"}
    assert firing["annotations"] == {"summary": summary(LOSS), "value": "0.0625"}
    assert datetime.fromisoformat(firing["startsAt"]) == datetime.fromtimestamp(1_790_000_000, UTC)
    lasts = timedelta(seconds=180)
    assert before + lasts <= datetime.fromisoformat(firing["endsAt"]) <= after + lasts
    assert before <= datetime.fromisoformat(resolved["endsAt"]) <= after


@pytest.mark.parametrize("firing", [True, False])
def test_a_clock_that_is_ahead_begins_no_alert_after_its_end(receiver: Receiver, firing: bool) -> None:
    ahead = replace(SILENT, firing=firing, since_ns=2**62)
    Alertmanager(receiver.url, 60, pytest.fail).send([ahead])
    (received,) = receiver.posted[0]
    assert datetime.fromisoformat(received["startsAt"]) <= datetime.now(UTC)
    assert received["startsAt"] <= received["endsAt"]


def test_only_the_last_of_two_changes_of_an_alert_is_sent(receiver: Receiver) -> None:
    Alertmanager(receiver.url, 60, pytest.fail).send([LOSS, replace(LOSS, firing=False)])
    (received,) = receiver.posted[0]
    assert received["annotations"]["summary"].startswith("host web-1 is resolved")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_temporary_failures_are_retried(receiver: Receiver, status: int) -> None:
    receiver.answers = [status, status]
    waits: list[float] = []
    Alertmanager(receiver.url, 60, waits.append).send([LOSS])
    assert len(waits) == 2
    assert len(receiver.posted) == 3


def test_a_truncated_answer_is_no_answer(receiver: Receiver) -> None:
    receiver.answers = [400]
    receiver.headers = {"Transfer-Encoding": "chunked"}  # which the body is not
    waits: list[float] = []
    Alertmanager(receiver.url, 60, waits.append).send([LOSS])
    assert len(waits) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 400, 404])
def test_rejected_alerts_do_not_delay_others(receiver: Receiver, caplog: pytest.LogCaptureFixture, status: int) -> None:
    receiver.answers = [status]
    receiver.headers = {"Location": "/"}
    sink = Alertmanager(receiver.url, 60, pytest.fail)
    sink.send([LOSS])
    assert [(record.levelno, f"{status} why" in record.message) for record in caplog.records] == [(logging.ERROR, True)]
    assert sink.rejected == 1


@pytest.mark.parametrize("kind", ["alertmanager", "webhook"])
def test_a_request_that_is_too_large_is_sent_in_parts(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A proxy's limit, which only an outage with many alerts reaches."""
    alerts = [replace(LOSS, group=f"web-{number}") for number in range(5)]
    receiver.answers = [413, 200, 413, 200, 413]  # 5; 2; 3; 1; 2, then one by one
    sink = Alertmanager(receiver.url, 60, pytest.fail) if kind == "alertmanager" else Webhook(receiver.url, pytest.fail)
    sink.send(alerts)
    assert list(map(len, receiver.posted)) == [5, 2, 3, 1, 2, 1, 1]
    assert sink.rejected == 0
    receiver.answers = [413]
    sink.send(alerts[:1])
    assert sink.rejected == 1
    assert "413 why" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 12\r\n\r\n<html>log in",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"220 mail.example.com ESMTP\r\n",
        b"\0" * 100,
        b"\x1b[31m\nINFO ready\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_not_alertmanagers_is_no_answer(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(Exception):
        pass

    def stop(seconds: float) -> None:
        raise Stop

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            visitor, _ = server.accept()
            with visitor:
                visitor.recv(1 << 16)
                visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Stop):
            Alertmanager(f"http://127.0.0.1:{server.getsockname()[1]}", 60, stop).send([LOSS])
        thread.join()
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_stop_ends_a_request_that_is_not_answered() -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            visitor, _ = server.accept()
            with visitor:
                stop.set()
                while visitor.recv(1 << 16):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Stopped):
            Alertmanager(f"http://127.0.0.1:{server.getsockname()[1]}", 60, pytest.fail, stop).send([LOSS])
        thread.join()


def test_the_wait_function_may_end_the_retries(receiver: Receiver) -> None:
    class Stop(Exception):
        pass

    def stop(seconds: float) -> None:
        raise Stop

    receiver.answers = [503]
    with pytest.raises(Stop):
        Alertmanager(receiver.url, 60, stop).send([LOSS])


def test_a_reminder_is_tried_once(receiver: Receiver) -> None:
    receiver.answers = [503]
    sink = Alertmanager(receiver.url, 60, pytest.fail)
    sink.repeat([LOSS])
    sink.repeat([])
    assert len(receiver.posted) == 1


def test_a_webhook_gets_each_change_once_with_all_that_the_topic_has(receiver: Receiver) -> None:
    receiver.answers = [503]
    waits: list[float] = []
    sink = Webhook(receiver.url, waits.append)
    sink.send([LOSS, COUNT])
    sink.repeat([LOSS])
    assert len(waits) == 1
    assert receiver.posted[0] == receiver.posted[1]
    assert len(receiver.posted) == 2
    first, second = receiver.posted[1]
    assert (first["rule"], first["firing"], first["summary"]) == ("loss", True, summary(LOSS))
    assert second["labels"] == {"team": "net"}


def test_the_path_of_a_webhook_is_not_logged(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.answers = [503]
    Webhook(f"{receiver.url}/hunter2?token=hunter2", lambda seconds: None).send([LOSS])
    assert f"Webhook at {receiver.url}/***: 503" in caplog.text
    assert "hunter2" not in caplog.text
