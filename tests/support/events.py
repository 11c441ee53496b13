"""Synthetic events, encoded as by the producer."""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from producer.encode.batch import BatchEncoder
from producer.events import CAUSES, KNOWN, TRANSMITS, Batch, SchemaId, Stream
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema

MS = 1_000_000


class Sent(NamedTuple):
    """A sent event; `last`, for retransmits, is the number of the flow's last transmit before it."""

    stream: Stream
    host: str
    cpu_seq: int
    at_ms: int
    daddr: str
    dport: int
    segs: int
    sample_rate: int = 1
    srtt_us: int = 0
    is_retransmit: bool = False
    cause: str = ""
    last: int | None = None
    boot_id: str = ""
    """Empty: the host's own."""


def messages(
    sent: Sequence[Sent], ids: Mapping[str, int], prefix: str, clock_step_ms: int = 0
) -> list[tuple[str, bytes, bytes]]:
    """Return topic, key and value of events; `ids` are schema ids by topic with prefix."""
    encoders = {
        (stream, host, boot_id): BatchEncoder(
            stream,
            load_schema(stream.schema_file),
            SchemaId(ids[prefix + stream.topic]),
            {"host": host, "boot_id": boot_id or f"boot of {host}"},
            CgroupPaths(None),
            "flow" if host.endswith("b") else "host",  # readers must do with both
        )
        for stream, host, boot_id in {(event.stream, event.host, event.boot_id) for event in sent}
    }
    made = []
    for event in sent:
        encoder = encoders[event.stream, event.host, event.boot_id]
        batch = encoder.encode(Batch(event.stream, row(event)), clock_step_ms * MS)
        key = batch.keys[batch.key_starts[0] :][: batch.key_lengths[0]].tobytes()
        made.append((prefix + event.stream.topic, key, batch.packed()))
    return made


def row(event: Sent) -> Any:
    """Return the ring row of an event."""
    made = np.zeros(1, event.stream.dtype)
    segment = made["s"]
    for side, address in (("saddr", "10.0.0.1"), ("daddr", event.daddr)):
        whole = ipaddress.ip_address(address)
        mapped = whole.packed if whole.version == 6 else b"\0" * 10 + b"\xff\xff" + whole.packed
        segment["flow"][side] = np.frombuffer(mapped, np.uint8)
    segment["flow"]["sport"], segment["flow"]["dport"] = 443, event.dport
    segment["flow"]["netns"] = 4026531840
    segment["ts"], segment["cpu_seq"] = event.at_ms * MS, event.cpu_seq
    segment["seq"], segment["end_seq"] = event.cpu_seq, event.cpu_seq + 1
    segment["known"] = sum(KNOWN.values())
    for name in ("segs", "sample_rate", "srtt_us"):
        segment[name] = getattr(event, name)
    if event.stream is TRANSMITS:
        made["is_retransmit"] = event.is_retransmit
    else:
        made["cause"] = CAUSES.index(event.cause)
    return made
