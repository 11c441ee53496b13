"""Single messages and records, as the readers take them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from producer.consume.columns import Columns
from producer.consume.decode import Decoder, UndecodableError


def decoded(decoder: Decoder, value: bytes | None) -> dict[str, Any]:
    """Return a message's record, or raise why there is none."""
    (record,) = decoder.records([value])
    if isinstance(record, UndecodableError):
        raise record
    return record


class Row(NamedTuple):
    """One row of the audit."""

    partition: int
    saddr: str
    """All else of the flow is the same."""
    sent_ms: int
    ts_ns: int
    host: str
    boot_id: str
    cpu: int
    cpu_seq: int


def events_of(rows: Sequence[Row]) -> Columns:
    """Return rows as the audit takes them."""
    texts: dict[str, int] = {}

    def column(values: Iterable[int]) -> Any:
        return np.array(list(values), np.int64)

    def texts_of(values: Iterable[str]) -> Any:
        return column(texts.setdefault(value, len(texts)) for value in values)

    zeros = np.zeros(len(rows), np.int64)
    cells = {
        "partition": column(row.partition for row in rows),
        "sent_ms": column(row.sent_ms for row in rows),
        "ts_ns": column(row.ts_ns for row in rows),
        "cpu": column(row.cpu for row in rows),
        "cpu_seq": column(row.cpu_seq for row in rows),
        "host": texts_of(row.host for row in rows),
        "boot_id": texts_of(row.boot_id for row in rows),
        "saddr": texts_of(row.saddr for row in rows),
        **dict.fromkeys(("daddr", "sport", "dport"), zeros),
    }
    return Columns(np.arange(len(rows)), cells, {}, list(texts), column(map(hash, texts)))
