"""The internal topic between the stages, tcp_alert_sums: what is in its messages, and in which partition a group is.

JSON, since nobody else reads it: {"part", "stream", "by", "width_ns", "start_ns", "segs": {group: number}}, the sums of
some groups in a window; or {"part", "watermark_ns"}. `part` is a partition of a topic of events, as tcp_retransmit/3.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from producer.alert.windows import Sums, View

TOPIC = "tcp_alert_sums"
_GROUPS = 500
"""Most in a message, which is far from too large then."""


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
        for at in range(0, len(share), _GROUPS):
            yield partition, _packed({**where, "segs": dict(share[at : at + _GROUPS])})


def watermark_message(part: str, watermark_ns: int) -> bytes:
    """Return the message that tells a partition's watermark."""
    return _packed({"part": part, "watermark_ns": watermark_ns})


def sums_of(message: dict[str, Any]) -> Sums:
    """Return the sums that a message tells."""
    return Sums(View(message["by"], message["width_ns"]), message["start_ns"], message["segs"])


def _packed(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
