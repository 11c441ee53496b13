"""Events as records, in the files that export and report read."""

import io
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
import numpy as np

from producer.events import FLOWS, RETRANSMITS, TRANSMITS, EncodedBatch, Stream
from producer.host.clock import now
from producer.schemas import frame, load_schema
from producer.spool.spool import Spool
from tests.support.records import VALUES, type_name

DAY_NS = 86_400_000_000_000
NOON_NS = 1_790_000_000_000_000_000 // DAY_NS * DAY_NS + DAY_NS // 2
"""Of 2026-09-21."""


def record(stream: Stream, **fields: Any) -> dict[str, Any]:
    """Return an event; fields that are not given are null, or have some value of their type."""
    schema = _parsed(stream.schema_file)["fields"]
    made = {each["name"]: each["default"] if "default" in each else VALUES[type_name(each["type"])] for each in schema}
    unknown = fields.keys() - made
    assert not unknown
    made.update(ts_ns=NOON_NS, sample_rate=1)
    made.update(fields)
    return {**made, "ts": made["ts_ns"] // 1_000_000}


def write_container(
    path: Path, stream: Stream, records: Sequence[dict[str, Any]], codec: str = "null", block_bytes: int = 4000
) -> Path:
    """Write an Avro object container file, as any tool does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fastavro.writer(file, _parsed(stream.schema_file), records, codec=codec, sync_interval=block_bytes)
    return path


def write_spool(folder: Path, stream: Stream, records: Sequence[dict[str, Any]]) -> Path:
    """Write a stream's spool with one batch."""
    spool = Spool(folder, stream, load_schema(stream.schema_file), now, max_bytes=1 << 24)
    spool.open()
    spool.append(encoded(stream, records), "ring", 1)
    spool.close()
    return folder


def encoded(stream: Stream, records: Sequence[dict[str, Any]]) -> EncodedBatch:
    """Return the messages of records."""
    messages = [message(stream, each) for each in records]
    lengths = np.array(list(map(len, messages)), np.int64)
    keys, zeros = np.frombuffer(b"host", np.uint8), np.zeros(len(messages), np.int64)
    payload = np.frombuffer(b"".join(messages), np.uint8)
    return EncodedBatch(stream, payload, np.cumsum(lengths) - lengths, lengths, keys, zeros, zeros + len(keys))


@cache
def _parsed(file: str) -> Any:
    return fastavro.parse_schema(load_schema(file))


def message(stream: Stream, each: dict[str, Any]) -> bytes:
    """Return a record in Confluent's wire format, with the fixed schema id."""
    value = io.BytesIO(frame(stream.fixed_schema_id))
    value.seek(0, io.SEEK_END)
    fastavro.schemaless_writer(value, _parsed(stream.schema_file), each, strict=True)
    return value.getvalue()


HOSTILE = "<script>alert(1)</script>&\"'$x^2$\n\x1b[31m\u202e%00 --> ]]> ${jndi}"
SECOND_NS = 1_000_000_000


def scene(hostile: str = HOSTILE) -> dict[Stream, list[dict[str, Any]]]:
    """Return a minute of three hosts: one of their twenty peers loses, another refuses, and one host has strange names.

    The losing peer's connections send 1000 segments each, of which 50 are retransmitted; the others lose nothing.
    """
    made: dict[Stream, list[dict[str, Any]]] = {TRANSMITS: [], RETRANSMITS: [], FLOWS: []}
    for number in range(60):
        host, peer = ("web-1", "web-2", hostile)[number % 3], f"10.0.0.{number % 20}"
        flow = {
            "host": host,
            "boot_id": f"boot of {host}",
            "sk_cookie": number + 1,
            "saddr": "10.1.0.1",
            "daddr": peer,
            "sport": 40_000 + number,
            "dport": 443,
            "unit": hostile if host == hostile else "nginx.service",
        }
        start_ns = NOON_NS + number * SECOND_NS
        losing = peer == "10.0.0.7"
        counters = {"segs_out": 1000, "data_segs_out": 900, "total_retrans": 50 * losing, "retrans_fast": 40 * losing}
        counters |= {"retrans_rto": 10 * losing, "dsack_dups": 5 * losing, "bytes_sent": 900 * 1448}
        counters |= {f"retrans_{cause}": 0 for cause in ("slow_start", "tlp", "syn", "syn_ack", "other")}
        gauges = {"srtt_us": 1000 + 500 * number, "min_rtt_us": 900, "snd_cwnd": 10, "mss": 1448}
        times = {"busy_time_us": 20_000_000, "rwnd_limited_us": 0, "sndbuf_limited_us": 0}
        made[FLOWS].append(
            record(
                FLOWS, **flow, **counters, **gauges, **times, start_ns=start_ns, ts_ns=start_ns + 30 * SECOND_NS,
                reason="close", state="ESTABLISHED", role="client",
            )
        )  # fmt: skip
        if losing:
            made[RETRANSMITS] += _retransmits(flow, start_ns)
            made[TRANSMITS] += _transmits(flow, start_ns)
    for at in range(5):
        made[FLOWS].append(
            record(
                FLOWS, host="web-1", boot_id="boot of web-1", sk_cookie=1000 + at, saddr="10.1.0.1", daddr="10.9.9.9",
                start_ns=NOON_NS, ts_ns=NOON_NS + at, reason="close", state="SYN_SENT", error="ECONNREFUSED",
                segs_out=1, total_retrans=0,
            )
        )  # fmt: skip
    for records in made.values():
        numbers: Counter[str] = Counter()
        for each in sorted(records, key=lambda each: each["ts_ns"]):
            numbers[each["host"]] += 1
            each["cpu"], each["cpu_seq"] = 0, numbers[each["host"]]
    return made


def _retransmits(flow: dict[str, Any], start_ns: int) -> list[dict[str, Any]]:
    return [
        record(
            RETRANSMITS, **flow, ts_ns=start_ns + at * SECOND_NS // 2, segs=1, err=0,
            cause="rto" if at % 5 == 4 else "fast",
            seq=(4_294_000_000 + at * 30_000) % (1 << 32), end_seq=(4_294_001_448 + at * 30_000) % (1 << 32),
            snd_cwnd=10 + at % 7, lost_out=1 + at % 3, rto_us=200_000 + 1000 * at,
        )
        for at in range(50)
    ]  # fmt: skip


def _transmits(flow: dict[str, Any], start_ns: int) -> list[dict[str, Any]]:
    return [
        record(
            TRANSMITS, **flow, ts_ns=start_ns + at * SECOND_NS // 40, segs=1, is_retransmit=False,
            seq=(4_294_000_000 + at * 1448) % (1 << 32), end_seq=(4_294_001_448 + at * 1448) % (1 << 32),
            snd_cwnd=10 + at % 17, lost_out=0, rto_us=200_000 + 100 * at,
        )
        for at in range(1000)
    ]  # fmt: skip


def write_scene(folder: Path, **how: Any) -> Path:
    """Write the scene's files."""
    for stream, records in scene(**how).items():
        write_container(folder / f"{stream.topic}.avro", stream, records)
    return folder
