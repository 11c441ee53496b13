"""The internal topic between the stages, tcp_alert_sums: its messages, and the partition of each group.

JSON, since nobody else reads it: {"part", "stream", "by", "width_ns", "start_ns", "segs": {group: number}}, the sums of
some groups in a window; or {"part", "watermark_ns"}. `part` is the source, a partition of an event
topic: tcp_retransmit/3.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

from producer.alert.windows import MOST_GROUP, MOST_SEGS, Grouping, Sums
from producer.consume.accepted import MOST_VALUE_BYTES

_GROUPS = 500
"""Most groups per message."""
_NAMES_BYTES = 1 << 18
"""Most bytes of group names per message, so that Kafka accepts it: by default up to 1 MB."""


def partition_of(by: str, group: str, partitions: int) -> int:
    """Return a group's partition of the sums topic."""
    return zlib.crc32(f"{by}/{group}".encode()) % partitions


def sums_messages(stream: str, source: str, sums: Sums, partitions: int) -> Iterator[tuple[int, bytes]]:
    """Yield (partition, message) for the sums of a window."""
    by_partition: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for group, segs in sums.segs.items():
        by_partition[partition_of(sums.grouping.by, group, partitions)].append((group, segs))
    where = {"part": source, "stream": stream, **sums.grouping._asdict(), "start_ns": sums.start_ns}
    for partition, groups in by_partition.items():
        for some in _batches(groups):
            yield partition, _packed({**where, "segs": some})


def _batches(groups: Iterable[tuple[str, int]]) -> Iterator[dict[str, int]]:
    batch: dict[str, int] = {}
    size = 0
    for group, segs in groups:
        size += len(json.dumps(group))
        if batch and (size > _NAMES_BYTES or len(batch) == _GROUPS):
            yield batch
            batch, size = {}, len(json.dumps(group))
        batch[group] = segs
    yield batch


def watermark_message(source: str, watermark_ns: int) -> bytes:
    """Return the message for a source's watermark."""
    return _packed({"part": source, "watermark_ns": watermark_ns})


class Watermark(NamedTuple):
    """The time up to which a source's windows are closed."""

    source: str
    ns: int


class PartitionSums(NamedTuple):
    """Sums of one source."""

    source: str
    stream: str
    sums: Sums


def read(value: bytes | None) -> Watermark | PartitionSums:
    """Parse a message; ValueError if we did not write it."""
    if value is None or len(value) > MOST_VALUE_BYTES:
        raise ValueError(f"empty, or longer than {MOST_VALUE_BYTES} bytes")
    message = json.loads(value)
    if not isinstance(message, dict) or not _is_name(source := message.get("part")):
        raise ValueError("neither sums nor a watermark")
    if "watermark_ns" in message:
        at_ns = message["watermark_ns"]
        if not _is_number(at_ns):
            raise ValueError("the watermark is not a time")
        return Watermark(source, at_ns)
    stream, by, width_ns, start_ns, segs = map(message.get, ("stream", "by", "width_ns", "start_ns", "segs"))
    if not (_is_name(stream) and _is_name(by) and _is_number(width_ns) and _is_number(start_ns)):
        raise ValueError("the window is not valid")
    if not isinstance(segs, dict) or not all(_is_name(group) and _is_number(count) for group, count in segs.items()):
        raise ValueError("the sums are not numbers of segments")
    return PartitionSums(source, stream, Sums(Grouping(by, width_ns), start_ns, segs))


def _is_name(text: Any) -> TypeGuard[str]:
    # encode() raises for a lone surrogate.
    return isinstance(text, str) and len(text) <= MOST_GROUP and (text.isascii() or bool(text.encode()))


def _is_number(number: Any) -> TypeGuard[int]:
    return type(number) is int and 0 <= number <= MOST_SEGS


def _packed(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
