"""What the connections of flow records did, without I/O.

A connection that closed is remembered until its window is decided, so that a copy of its last record counts nothing;
others, until they have had no record for an hour. If there are too many, the oldest are forgotten.
"""

import numpy as np

from producer.alert.model import Counts
from producer.connections import Connections, Growth, connection_keys
from producer.consume.columns import Columns
from producer.consume.plan import Fields
from producer.events import CAUSES

CAUSE_COUNTERS = tuple(f"retrans_{cause}" for cause in CAUSES)
COUNTERS = ("segs_out", "data_segs_out", "total_retrans", *CAUSE_COUNTERS)
FIELDS: Fields = (
    ("boot_id", "string"),
    ("netns", "long"),
    ("sk_cookie", "long?"),
    ("start_ns", "long?"),
    ("reason", "string"),
    ("role", "string?"),
    *((name, "long?") for name in COUNTERS),
)
MOST_CONNECTIONS = 1 << 22
"""About 0.5 GiB."""
_EXPIRES_NS = 3_600_000_000_000


class Fleet:
    """The connections of all hosts; all records since `since_ns` are known."""

    def __init__(self, since_ns: int, counts: Counts, most: int = MOST_CONNECTIONS) -> None:
        self._table = Connections(COUNTERS, since_ns, most)
        self._counts = counts

    def __len__(self) -> int:
        return len(self._table)

    def add(self, flows: Columns) -> Growth:
        """Take records with possible numbers."""
        self._counts.forgotten += self._table.make_room(len(flows))
        host, boot = flows.hashes[flows["host"]], flows.hashes[flows["boot_id"]]
        ends = [flows.hashes[flows["saddr"]], flows.hashes[flows["daddr"]], flows["sport"], flows["dport"]]
        keys = connection_keys(host, boot, flows["netns"], flows["sk_cookie"], flows.valid["sk_cookie"], ends)
        start_ns = np.where(flows.valid["start_ns"], flows["start_ns"], 0)
        close, server = (flows.texts.index(text) if text in flows.texts else -1 for text in ("close", "server"))
        accepted = flows.valid["role"] & (flows["role"] == server)
        counters = [flows[name] for name in COUNTERS]
        return self._table.add(
            keys, flows["ts_ns"], start_ns, flows["reason"] == close, counters, flows.valid["segs_out"], accepted
        )

    def forget(self, decided_ns: int) -> None:
        """Forget what no window after `decided_ns` needs."""
        self._table.forget(decided_ns, decided_ns - _EXPIRES_NS)
