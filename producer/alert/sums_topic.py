"""The internal topic between the stages, tcp_alert_sums: what is in its messages, and in which partition a group is.

JSON, since nobody else reads it: {"part", "stream", "by", "width_ns", "start_ns", "segs": {group: number}}, the sums of
some groups in a window; or {"part", "watermark_ns"}. `part` is a partition of a topic of events, as tcp_retransmit/3.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

from producer.alert.windows import MOST_GROUP, MOST_SEGS, Sums, View
from producer.consume.accepted import MOST_VALUE_BYTES

_GROUPS = 500
"""Most in a message."""
_NAMES_BYTES = 1 << 18
"""Most bytes of their names, so that Kafka takes the message: by default up to 1 MB."""


def partition_of(by: str, group: str, partitions: int) -> int:
    """Return the partition of the sums in which a group is."""
    return zlib.crc32(f"{by}/{group}".encode()) % partitions


def sums_messages(stream: str, part: str, sums: Sums, partitions: int) -> Iterator[tuple[int, bytes]]:
    """Yield (partition, message) for the sums of a window."""
    shares: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for group, segs in sums.segs.items():
        shares[partition_of(sums.view.by, group, partitions)].append((group, segs))
    where = {"part": part, "stream": stream, **sums.view._asdict(), "start_ns": sums.start_ns}
    for partition, share in shares.items():
        for some in _batches(share):
            yield partition, _packed({**where, "segs": some})


def _batches(share: Iterable[tuple[str, int]]) -> Iterator[dict[str, int]]:
    batch: dict[str, int] = {}
    size = 0
    for group, segs in share:
        size += len(json.dumps(group))
        if batch and (size > _NAMES_BYTES or len(batch) == _GROUPS):
            yield batch
            batch, size = {}, len(json.dumps(group))
        batch[group] = segs
    yield batch


def watermark_message(part: str, watermark_ns: int) -> bytes:
    """Return the message that tells a partition's watermark."""
    return _packed({"part": part, "watermark_ns": watermark_ns})


class Watermark(NamedTuple):
    """Up to when a partition's windows are closed."""

    part: str
    ns: int


class PartSums(NamedTuple):
    """Sums of a partition."""

    part: str
    stream: str
    sums: Sums


def read(value: bytes | None) -> Watermark | PartSums:
    """Return what a message tells; ValueError for whatever none of us has written."""
    if value is None or len(value) > MOST_VALUE_BYTES:
        raise ValueError(f"not a message of up to {MOST_VALUE_BYTES} bytes")
    message = json.loads(value)
    if not isinstance(message, dict) or not _is_name(part := message.get("part")):
        raise ValueError("neither sums nor a watermark")
    if "watermark_ns" in message:
        at_ns = message["watermark_ns"]
        if not _is_number(at_ns):
            raise ValueError("a watermark that is no time")
        return Watermark(part, at_ns)
    stream, by, width_ns, start_ns, segs = map(message.get, ("stream", "by", "width_ns", "start_ns", "segs"))
    if not (_is_name(stream) and _is_name(by) and _is_number(width_ns) and _is_number(start_ns)):
        raise ValueError("sums of no window")
    if not isinstance(segs, dict) or not all(_is_name(group) and _is_number(count) for group, count in segs.items()):
        raise ValueError("sums that are no numbers of segments")
    return PartSums(part, stream, Sums(View(by, width_ns), start_ns, segs))


def _is_name(text: Any) -> TypeGuard[str]:
    # A lone surrogate has no UTF-8.
    return isinstance(text, str) and len(text) <= MOST_GROUP and (text.isascii() or bool(text.encode()))


def _is_number(number: Any) -> TypeGuard[int]:
    return type(number) is int and 0 <= number <= MOST_SEGS


def _packed(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
