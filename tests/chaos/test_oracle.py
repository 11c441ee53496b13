"""The oracle counts each gap, duplicate and foreign message, and the account each reported loss."""

import io
import json
import random

import fastavro

from tests.chaos.account import TopicAccount
from tests.chaos.oracle import Oracle
from tests.support.topics import SCHEMAS

BOOT_ID = "5f0c0e2a-0000-4000-8000-00000000abcd"


def value(cpu: int, cpu_seq: int, *, schema_id: int = 7, host: str = "chaos") -> bytes:
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "tcp_transmit.avsc").read_text()))
    front = schema["fields"][:6]  # type: ignore[call-overload,index]
    out = io.BytesIO()
    record = {"ts": 1_795_942_928_123, "ts_ns": 1_795_942_928_123_456_789, "cpu": cpu, "cpu_seq": cpu_seq}
    fastavro.schemaless_writer(
        out, {"type": "record", "name": "Front", "fields": front}, {**record, "host": host, "boot_id": BOOT_ID}
    )
    return b"\0" + schema_id.to_bytes(4, "big") + out.getvalue() + random.randbytes(40)


def oracle() -> Oracle:
    return Oracle("chaos", {"tcp_transmit": 7}, BOOT_ID)


def test_gaps_copies_and_generations_are_counted() -> None:
    seen = oracle()
    seen.add("tcp_transmit", [value(0, number) for number in range(1, 200) if number not in (5, 77)])
    seen.add("tcp_transmit", [value(0, 3), value(0, 3), value(255, 1), value(1, (1 << 32) + 1)])
    seen.add("tcp_transmit", [value(300, number) for number in (149_998, 1)])
    report = seen.report()["tcp_transmit"]
    assert report == {
        "messages": 197 + 4 + 2,
        "foreign": 0,
        "distinct": 197 + 1 + 1 + 2,
        "missing": 2 + 149_996,
        "generations": 2,
    }


def test_messages_of_another_schema_host_or_form_are_foreign() -> None:
    seen = oracle()
    foreign = [value(0, 1, schema_id=0), value(0, 1, host="other"), b"", None, b"\0\0\0\0\7", value(0, -1)]
    seen.add("tcp_transmit", [*foreign, value(0, 1)])
    report = seen.report()
    assert (report["tcp_transmit"]["foreign"], report["tcp_transmit"]["distinct"]) == (len(foreign), 1)
    assert report["foreign_samples"]


def test_an_account_continues_over_crashes_and_restarts_with_new_rings() -> None:
    account = TopicAccount()
    account.note(100, 0, 90, 8, {"nested": 2})
    account.note(150, 0, 140, 0, {"nested": 2, "spool_dropped": 8})
    account.note(160, 0, 157, 0, {"nested": 3})  # after a crash whose ledger could not be written
    account.note(170, 0, 164, 0, {"nested": 3, "spool_dropped": 3})
    account.new_rings()
    account.note(30, 20, 20, 3, {"stopped": 7})
    assert account.numbered == 167 + 10
    assert account.lost == {"nested": 3, "spool_dropped": 11, "stopped": 7}
    assert account.named == 18
    assert account.unaccounted == 0
    account.note(31, 20, 20, 3, {"stopped": 7})
    assert account.unaccounted == 1
