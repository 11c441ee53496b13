"""Single messages and records, as the readers take them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from producer.consume.audit import Rows
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
    key: bytes
    """Of the flow within its host and boot."""
    timestamp_ms: int
    ts_ns: int
    host: str
    boot_id: str
    cpu: int
    cpu_seq: int


def rows_of(rows: Sequence[Row]) -> Rows:
    """Return rows as the audit takes them."""
    texts: dict[str, int] = {}

    def column(values: Sequence[int]) -> Any:
        return np.array(values, np.int64)

    return Rows(
        column([row.partition for row in rows]),
        column([row.timestamp_ms for row in rows]),
        column([hash((row.key, row.host, row.boot_id)) for row in rows]),
        column([row.ts_ns for row in rows]),
        column([texts.setdefault(row.host, len(texts)) for row in rows]),
        column([texts.setdefault(row.boot_id, len(texts)) for row in rows]),
        column([row.cpu for row in rows]),
        column([row.cpu_seq for row in rows]),
        list(texts),
    )
