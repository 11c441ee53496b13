"""Synthetic flow records, encoded as by the producer."""

import errno
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from producer.encode.batch import BatchEncoder
from producer.events import CAUSES, FLOW_EVENT, FLOWS, KNOWN, REASONS, ROLES, STATES, Batch, SchemaId
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema

MS = 1_000_000
_ALL = sum(KNOWN.values())


@dataclass(frozen=True, slots=True)
class Flow:
    """A record of a connection. Counters are since its beginning at `start_ms`; None: it is older than the producer.

    A cookie of 0 is unknown.
    """

    host: str
    cookie: int
    at_ms: int
    start_ms: int | None
    segs: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    daddr: str = "192.0.2.1"
    sport: int = 40_000
    dport: int = 443
    close: bool = False
    state: str = "ESTABLISHED"
    error: str = ""
    srtt_us: int = 0
    data_segs: int | None = None
    role: str = "client"


def row(flow: Flow, number: int) -> Any:
    """Return the ring row of a record."""
    made = np.zeros(1, FLOW_EVENT)
    for side, address in (("saddr", "10.0.0.1"), ("daddr", flow.daddr)):
        whole = ipaddress.ip_address(address)
        mapped = whole.packed if whole.version == 6 else b"\0" * 10 + b"\xff\xff" + whole.packed
        made["flow"][side] = np.frombuffer(mapped, np.uint8)
    made["flow"]["sport"], made["flow"]["dport"] = flow.sport, flow.dport
    made["flow"]["sk_cookie"], made["flow"]["flow_known"] = flow.cookie, flow.cookie > 0
    made["flow"]["netns"] = 4026531840
    unknown = 0 if flow.start_ms is not None else KNOWN["start_ns"]
    unknown |= 0 if flow.error else KNOWN["error"]
    made["known"] = _ALL & ~unknown
    made["ts"], made["start_ns"] = flow.at_ms * MS, (flow.start_ms or 0) * MS
    made["cpu_seq"], made["sample_rate"] = number, 1
    made["reason"], made["role"] = REASONS.index("close" if flow.close else "interval"), ROLES.index(flow.role)
    made["state"], made["srtt_us"] = STATES.index(flow.state), flow.srtt_us
    made["error"] = getattr(errno, flow.error) if flow.error else 0
    made["segs_out"] = flow.segs
    made["data_segs_out"] = flow.segs if flow.data_segs is None else flow.data_segs
    made["total_retrans"] = sum(flow.causes.values())
    for cause in CAUSES:
        made[f"retrans_{cause}"] = flow.causes.get(cause, 0)
    return made


def values(
    flows: Sequence[Flow], schema_id: int = FLOWS.fixed_schema_id, labels: Mapping[str, Mapping[str, str]] | None = None
) -> list[bytes]:
    """Return the records as values of messages; `labels` are the hosts' site labels."""
    schema = load_schema(FLOWS.schema_file)
    encoders = {
        host: BatchEncoder(
            FLOWS,
            schema,
            SchemaId(schema_id),
            {"host": host, "boot_id": f"boot of {host}", "labels": (labels or {}).get(host, {})},
            CgroupPaths(None),
        )
        for host in {flow.host for flow in flows}
    }
    return [
        encoders[flow.host].encode(Batch(FLOWS, row(flow, number)), 0).packed() for number, flow in enumerate(flows, 1)
    ]
