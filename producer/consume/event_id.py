"""Reads what `verify` audits from events: their ids, times and flows."""

import numpy as np

from producer.consume.columns import Columns, Values
from producer.consume.decode import Decoder, Rejected
from producer.consume.plan import Fields
from producer.host.text import MAX_NAME

_FIELDS: Fields = (
    ("ts_ns", "long"),
    ("cpu", "long"),
    ("cpu_seq", "long"),
    ("host", "string"),
    ("boot_id", "string"),
    ("saddr", "string"),
    ("daddr", "string"),
    ("sport", "long"),
    ("dport", "long"),
)


def read_events(decoder: Decoder, values: Values) -> tuple[Columns, list[Rejected]]:
    """Decode a batch of events; those with impossible numbers and names are rejected too."""
    events, rejected = decoder.columns(values, _FIELDS)
    possible = events["cpu_seq"] > 0
    lengths = np.array(list(map(len, events.texts)), np.int64)
    for name in ("host", "boot_id") if lengths.max(initial=0) > MAX_NAME else ():
        possible &= lengths[events[name]] <= MAX_NAME
    if possible.all():
        return events, rejected
    reason = "cpu_seq is out of range, or host or boot_id is too long"
    rejected += [Rejected(row, reason) for row in events.rows[~possible].tolist()]
    return events.select(possible), rejected
