"""The heartbeat: every INTERVAL_S a record in a topic of its own, which tells a quiet host from a dead one.

Key: the host's name in UTF-8. Value: Confluent-framed Avro of schemas/rebpf_agent.avsc.
"""

import io
import json
from typing import Any

import fastavro

from producer.encode import frame
from producer.events import SchemaId, Topic
from producer.paths import SCHEMAS
from producer.status import Status

INTERVAL_S = 10.0
TOPIC = Topic("rebpf_agent")
FIXED_SCHEMA_ID = SchemaId(3)
"""The id in the Confluent frame where no registry is configured."""


def heartbeat_schema() -> dict[str, Any]:
    """Return the published schema."""
    schema: dict[str, Any] = json.loads((SCHEMAS / "rebpf_agent.avsc").read_text())
    return schema


class HeartbeatEncoder:
    """Makes heartbeats of statuses."""

    def __init__(self, schema_id: SchemaId) -> None:
        self._schema = fastavro.parse_schema(heartbeat_schema())
        self._frame = frame(schema_id)

    def encode(self, status: Status, now_s: float) -> tuple[bytes, bytes]:
        """Return the message's key and value; `now_s` is the time in seconds since 1970 UTC."""
        record = status.as_dict()
        record["started"] = round(record.pop("started_s") * 1000)
        record |= {"ts": round(now_s * 1000), "interval_s": INTERVAL_S}
        value = io.BytesIO(self._frame)
        value.seek(len(self._frame))
        fastavro.schemaless_writer(value, self._schema, record, strict=True)
        return status.host.encode(), value.getvalue()
