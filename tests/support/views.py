"""Records as the views read them."""

from typing import Any

import numpy as np

from producer.consume.decode import Decoder
from producer.events import CAUSES, FLOWS, KNOWN, REASONS, RETRANSMITS, ROLES, STATES, TRANSMITS, Batch, Stream
from producer.view.records import Records
from tests.support.encoding import OFFSET_NS, encoder_of, messages

SECOND_NS = 1_000_000_000


def decoded(stream: Stream, rows: Any) -> Records:
    """Return rows of a ring as a view gets them."""
    values = [value for _, value in messages(encoder_of(stream).encode(Batch(stream, rows), OFFSET_NS))]
    parts, _ = Decoder(None).tables(values, None)
    [(_, table)] = parts
    return Records.from_table(stream, table)


def retransmits(*events: dict[str, Any]) -> Any:
    """Return rows of retransmissions; fields are those of the row, its segment or its flow."""
    return _rows(RETRANSMITS, events)


def transmits(*events: dict[str, Any]) -> Any:
    return _rows(TRANSMITS, events)


def flows(*events: dict[str, Any]) -> Any:
    return _rows(FLOWS, events)


def _rows(stream: Stream, events: tuple[dict[str, Any], ...]) -> Any:
    rows = np.zeros(len(events), stream.dtype)
    for row, event in zip(rows, events, strict=True):
        segment = row["s"] if stream != FLOWS else row
        segment["known"] = sum(KNOWN.values()) & ~event.get("unknown", 0)
        segment["flow"]["flow_known"] = 7
        for side in ("saddr", "daddr"):
            segment["flow"][side][10:12] = 255
        for name, value in {"segs": 1, "state": "ESTABLISHED", **event}.items():
            _put(row, segment, name, value)
    return rows


def _put(row: Any, segment: Any, name: str, value: Any) -> None:
    for names, texts in (("cause", CAUSES), ("state", STATES), ("reason", REASONS), ("role", ROLES)):
        if name == names:
            value = texts.index(value)
    if name in ("saddr", "daddr"):
        segment["flow"][name][12:] = [int(part) for part in value.split(".")]
    elif name == "comm":
        segment["comm"][: len(value)] = list(value.encode())
    else:
        target = next((each for each in (row, segment, segment["flow"]) if name in each.dtype.names), None)
        if target is not None:
            target[name] = value
