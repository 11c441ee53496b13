"""The topics' content, read with kcat and fastavro only, and its invariants."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastavro

from tests.support.rebpf import DEADLINE_S, wait_until
from tests.support.servers.consume import Message, decode, kcat_messages
from tests.support.wire import Segment

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"
TRANSMIT, RETRANSMIT, FLOW = "tcp_transmit", "tcp_retransmit", "tcp_flow"
FIXED_IDS = {TRANSMIT: 1, RETRANSMIT: 2, FLOW: 5}


class Event(NamedTuple):
    """A message, the schema id of its frame, and its record."""

    message: Message
    schema_id: int
    record: dict[str, Any]


def read(bootstrap: str, topic: str, prefix: str = "") -> list[Event]:
    """Read all of the topic `prefix` + `topic`, in the order of its partitions."""
    schema: Any = fastavro.parse_schema(json.loads((SCHEMAS / f"{topic}.avsc").read_text()))
    messages = kcat_messages(bootstrap, prefix + topic)
    return [Event(message, *decode(message.value or b"", schema)) for message in messages]


def wait_for_events(
    bootstrap: str, topic: str, cause: Callable[[], Any] = lambda: None, deadline_s: float = DEADLINE_S
) -> int:
    """Cause events, wait until the topic has messages, and return their number."""
    cause()
    count: int = wait_until(f"messages in {topic}", lambda: len(kcat_messages(bootstrap, topic)), deadline_s)
    return count


def segment(event: Event) -> Segment:
    """Return the segment of an event."""
    return Segment(*(event.record[name] for name in Segment._fields))


def assert_one_each(events: Sequence[Event]) -> None:
    """Check that event ids are unique."""
    ids = Counter((event.record["boot_id"], event.record["cpu"], event.record["cpu_seq"]) for event in events)
    assert not [each for each, count in ids.items() if count > 1]


def assert_none_twice(events: Sequence[Event]) -> None:
    """Check that event ids are unique, without gaps per CPU."""
    assert_one_each(events)
    last: dict[tuple[str, int], int] = {}
    for boot_id, cpu, cpu_seq in (
        tuple(event.record[name] for name in ("boot_id", "cpu", "cpu_seq")) for event in events
    ):
        last[boot_id, cpu] = max(cpu_seq, last.get((boot_id, cpu), 0))
    assert sum(last.values()) == len(events)


def distinct(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the records without repeated ones, after checking that no event number of a CPU is missing."""
    by_id = {(event.record["boot_id"], event.record["cpu"], event.record["cpu_seq"]): event.record for event in events}
    numbers: dict[tuple[str, int], list[int]] = {}
    for boot_id, cpu, cpu_seq in by_id:
        numbers.setdefault((boot_id, cpu), []).append(cpu_seq)
    missing = {cpu: max(seen) - len(seen) for cpu, seen in numbers.items() if max(seen) > len(seen)}
    assert not missing
    return list(by_id.values())


def assert_complete(balance: dict[str, Any], events: Sequence[Event]) -> None:
    """Check a topic's balance at the end of a run that lost nothing against what is in the topic."""
    expected = {
        "passed": len(events),
        "delivered": len(events),
        "spooled": 0,
        "in_flight": 0,
        "in_ring": 0,
        "carried": 0,
        "lost": {},
    }
    assert balance == expected


def partition(key: bytes, partitions: int) -> int:
    """Return the partition that the Java client's default partitioner puts a key into."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """Return org.apache.kafka.common.utils.Utils.murmur2, as the unsigned number of the same 32 bits."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15
