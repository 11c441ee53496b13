"""A minimal service that uses systemd's descriptor store: `python -m tests.support.fdstore_service FILE PORT [hold]`.

It writes each transmitted segment of a port to FILE as a line of JSON, and an empty line when it has committed the ring
up to there. With `hold` it never commits, as if nothing was acknowledged. Its lines on standard error are those of
`rebpf run`, as far as the tests need them.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, NamedTuple

from producer.events import TRANSMITS, Rows
from producer.health.balance import Balance
from producer.host import capabilities
from producer.host.systemd import notify
from producer.kernel.capture import Capture
from producer.kernel.fdstore import FdStore
from producer.kernel.ringbuf import Ring
from tests.support.capture import hook_settings
from tests.support.rules import filtered
from tests.support.wire import Segment


class Event(NamedTuple):
    """A line of the file."""

    cpu: int
    cpu_seq: int
    segment: Segment


def read(file: Path) -> list[Event]:
    """Return the events of a file up to the last commit."""
    text, _, _ = file.read_text().rpartition("\n\n")
    lines = (line for line in text.split("\n") if line)
    return [Event(cpu, cpu_seq, Segment(*segment)) for cpu, cpu_seq, segment in map(json.loads, lines)]


def _events(rows: Rows) -> Iterator[Event]:
    for row in rows["s"]:
        flow = row["flow"]
        saddr, daddr = (_address(bytes(flow[name])) for name in ("saddr", "daddr"))
        numbers = [row[name] for name in ("seq", "ack_seq", "tcp_flags", "payload_len")]
        seq, ack_seq, tcp_flags, payload_len = map(int, numbers)
        yield Event(
            int(row["cpu"]),
            int(row["cpu_seq"]),
            Segment(saddr, int(flow["sport"]), daddr, int(flow["dport"]), seq, ack_seq, tcp_flags, payload_len),
        )


def _address(packed: bytes) -> str:
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _balance(capture: Capture, ring: Ring) -> Balance:
    kernel = capture.counters(TRANSMITS)
    lost = {"ring_full": kernel.ring_full, "nested": kernel.nested}
    return Balance(kernel.passed + kernel.nested, ring.records_before, in_ring=ring.unread, lost=lost)


def main(file: str, port: str, *hold: str) -> None:
    stop: list[Any] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    signal.signal(signal.SIGHUP, lambda number, frame: print("reload", file=sys.stderr, flush=True))
    settings = hook_settings(rules=filtered(ports=(int(port),)))
    with FdStore() as store, Capture(settings, store) as capture, open(file, "w") as out:
        capture.load()
        capabilities.drop_unneeded(lambda: capture.sequence(TRANSMITS))
        with capture.ring(TRANSMITS) as ring:
            capture.attach()
            print("ready", "taken_over=true" if capture.taken_over else "", file=sys.stderr, flush=True)
            notify("READY=1")
            end = float("inf")
            while ring.records_before < end:
                if stop and end == float("inf"):
                    end = ring.records_before + ring.unread
                    continue
                rows = ring.read(1 << 12)
                if not len(rows):
                    time.sleep(0.02)
                    continue
                out.writelines(json.dumps(event) + "\n" for event in _events(rows))
                out.flush()
                if not hold:
                    ring.commit(ring.position)
                out.write("\n")
                out.flush()
            print("balance tcp_transmit", _balance(capture, ring), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
