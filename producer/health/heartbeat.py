"""The heartbeat: a record every INTERVAL_S in a separate topic, which distinguishes a quiet host from a dead one.

Key: the host's name in UTF-8. Value: Confluent-framed Avro of schemas/rebpf_agent.avsc.
"""

from producer.events import HEARTBEATS, SchemaId
from producer.health.status import Status
from producer.schemas import RecordEncoder

INTERVAL_S = 10.0


class HeartbeatEncoder:
    """Encodes statuses as heartbeats."""

    def __init__(self, schema_id: SchemaId) -> None:
        self._encoder = RecordEncoder(HEARTBEATS, schema_id)

    def encode(self, status: Status, now_s: float) -> tuple[bytes, bytes]:
        """Return the message's key and value; `now_s` is the time in seconds since 1970 UTC."""
        record = status.as_dict()
        record["started"] = round(record.pop("started_s") * 1000)
        record |= {"ts": round(now_s * 1000), "interval_s": INTERVAL_S}
        return status.host.encode(), self._encoder.encode(record)
