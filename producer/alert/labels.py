"""The site labels of hosts, from their records.

Columns have no maps. A host's records all have the same labels, so one record a minute is decoded.
"""

import io
import time
from collections.abc import Callable, Mapping

import fastavro
import numpy as np

from producer.consume.columns import Columns, Values, schema_ids
from producer.consume.decode import Decoder

_MOST_HOSTS = 100_000
_REMEMBERED_S = 60.0
_FRAME_BYTES = 5


class HostLabels:
    """The labels of up to 100,000 hosts; of more, the records are decoded more often."""

    def __init__(self, decoder: Decoder, clock: Callable[[], float] = time.monotonic) -> None:
        self._decoder = decoder
        self._clock = clock
        self._known: dict[str, tuple[float, Mapping[str, str]]] = {}

    def of(self, records: Columns, values: Values) -> list[Mapping[str, str]]:
        """Return the labels of each of the batch's texts that is a host; others have none."""
        found: list[Mapping[str, str]] = [{}] * len(records.texts)
        now = self._clock()
        hosts, rows = np.unique(records["host"], return_index=True)
        for host, row in zip(hosts.tolist(), records.rows[rows].tolist(), strict=True):
            name = records.texts[host]
            until, found[host] = self._known.get(name, (0.0, {}))
            if until < now:
                if len(self._known) >= _MOST_HOSTS:
                    self._known.clear()
                found[host] = self._decoded(values[row] or b"")
                self._known[name] = now + _REMEMBERED_S, found[host]
        return found

    def _decoded(self, value: bytes) -> Mapping[str, str]:
        # The native decoder has accepted the value: its length bounds what is decoded here.
        (schema_id,) = schema_ids([value]).tolist()
        schema = self._decoder.schema(schema_id)
        record = fastavro.schemaless_reader(io.BytesIO(value[_FRAME_BYTES:]), schema, None)
        labels: Mapping[str, str] = record.get("labels") or {}  # type: ignore[union-attr] # it is a record
        return labels
