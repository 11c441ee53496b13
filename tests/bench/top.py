"""What `rebpf top --brokers` costs for a fleet: decode and aggregate records of connections, and make the table.

Usage: python -m tests.bench.top [HOSTS] [CONNECTIONS]. Prints records/s for each of three rounds of all hosts' records,
in one thread, without Kafka's client.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from producer.consume.decode import Decoder
from producer.encode.batch import BatchEncoder
from producer.events import FLOWS, KNOWN, REASONS, STATES, Batch
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from producer.view.flows import Flows
from producer.view.records import Records
from producer.view.table import table
from tests.support.encoding import messages

_BATCH = 10_000


def rows(host: int, connections: int) -> Any:
    """Return records of a host's connections to peers in one network."""
    made = np.zeros(connections, FLOWS.dtype)
    number = np.arange(connections) + host * connections
    for side in ("saddr", "daddr"):
        made["flow"][side][:, 10:12] = 255
    made["flow"]["daddr"][:, 12:] = np.stack(
        [np.full(connections, 10), number >> 16 & 63, number >> 8 & 255, number & 255], 1
    )
    made["flow"]["sk_cookie"], made["flow"]["flow_known"] = 1 + np.arange(connections), 7
    made["flow"]["dport"], made["flow"]["sport"] = 443, 30_000 + np.arange(connections)
    made["known"] = sum(KNOWN.values())
    made["reason"], made["state"] = REASONS.index("interval"), STATES.index("ESTABLISHED")
    made["srtt_us"] = 1000 + number % 5000
    return made


def values(hosts: int, connections: int) -> Sequence[list[bytes | None]]:
    """Return three rounds of messages of all hosts."""
    schema = load_schema(FLOWS.schema_file)
    rounds: list[list[bytes | None]] = [[], [], []]
    for host in range(hosts):
        fields = {"host": f"web-{host}.example", "boot_id": f"{host:036}"}
        encoder = BatchEncoder(FLOWS, schema, FLOWS.fixed_schema_id, fields, CgroupPaths(None), "host")
        made = rows(host, connections)
        for number, found in enumerate(rounds):
            made["segs_out"], made["total_retrans"] = 100 * number, host % 7 * number
            found += [value for _, value in messages(encoder.encode(Batch(FLOWS, made), number * 10_000_000_000))]
    return rounds


def main() -> None:
    """Measure."""
    hosts, connections = (int(each) for each in (*sys.argv[1:], *("5000", "10")[len(sys.argv) - 1 :]))
    decoder = Decoder(None)
    flows = Flows(0)
    for number, found in enumerate(values(hosts, connections)):
        start = time.process_time()
        for first in range(0, len(found), _BATCH):
            parts, _ = decoder.tables(found[first : first + _BATCH], None)
            for _, part in parts:
                flows.add(Records.from_table(FLOWS, part), 10.0 * number)
        took = time.process_time() - start
        start = time.process_time()
        shown = table(flows, "peer", "retransmitted", 10.0 * number, 10.0, 50)
        made = time.process_time() - start
        print(
            f"round {number + 1}: {len(found)} records, {len(found) / took:,.0f} records/s of CPU;"
            f" a table of {shown.groups} peers in {made * 1000:.0f} ms"
        )


if __name__ == "__main__":
    main()
