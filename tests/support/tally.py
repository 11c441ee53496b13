"""Counts the events of steady traffic in a topic, when there are too many to keep as records."""

import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import fastavro

from tests.support.servers.consume import kcat_messages
from tests.support.topics import SCHEMAS, TRANSMIT


@dataclass(slots=True)
class Tally:
    """Events of one boot and one host, whose numbers began at 1."""

    numbers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Each CPU's numbers (cpu_seq) that are there."""
    copies: int = 0
    """Events that are there again."""
    payload: Counter[int] = field(default_factory=Counter)
    """Payload bytes by the sender's port, without retransmissions."""
    inversions: int = 0
    """Events that are older than one of their flow before them; copies do not count."""
    sample: dict[str, Any] = field(default_factory=dict)
    """The first event that is older."""

    @property
    def events(self) -> int:
        """Distinct events."""
        return sum(map(len, self.numbers.values()))

    @property
    def missing(self) -> int:
        """Missing numbers, up to the last of each CPU."""
        return sum(max(numbers) - len(numbers) for numbers in self.numbers.values())

    def assert_whole(self, sent: dict[int, int]) -> None:
        """Check that no numbers are missing, and no bytes of `sent`, by the sender's port."""
        found = {"missing": self.missing, "inversions": self.inversions}
        assert found == {"missing": 0, "inversions": 0}, self.sample
        assert {port: self.payload[port] for port in sent} == sent


def tally(bootstrap: str, prefix: str) -> Tally:
    """Read the transmit topic with this prefix."""
    schema: Any = fastavro.parse_schema(json.loads((SCHEMAS / f"{TRANSMIT}.avsc").read_text()))
    counted = Tally()
    latest: dict[tuple[Any, ...], int] = {}
    for message in kcat_messages(bootstrap, prefix + TRANSMIT, timeout_s=180):
        record: Any = fastavro.schemaless_reader(io.BytesIO((message.value or b"")[5:]), schema, None)
        numbers = counted.numbers[record["cpu"]]
        if record["cpu_seq"] in numbers:
            counted.copies += 1
            continue
        numbers.add(record["cpu_seq"])
        flow = tuple(record[name] for name in ("netns", "saddr", "sport", "daddr", "dport"))
        if record["ts_ns"] < latest.get(flow, 0):
            counted.inversions += 1
            counted.sample = counted.sample or {**record, "latest": latest[flow], "offset": message.offset}
        latest[flow] = max(record["ts_ns"], latest.get(flow, 0))
        if not record["is_retransmit"]:
            counted.payload[record["sport"]] += record["payload_len"]
    return counted
