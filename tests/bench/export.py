"""How many events per second `rebpf export` writes.

python -m tests.bench.export [EVENTS]. Writes connection records of 50 hosts to a spool and to an Avro file in memory
(/dev/shm), exports each as Parquet and CSV, and prints events per second of CPU, of the fastest of six rounds.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from producer.commands.export import export
from producer.consume.period import Period
from producer.events import FLOWS
from producer.export.sources import Files
from tests.support.analysis import NOON_NS, record, write_container, write_spool

_BATCH = 4000


def records(first: int, count: int) -> list[dict[str, object]]:
    """Return records with as many different values as those of a fleet."""
    return [
        record(
            FLOWS, ts_ns=NOON_NS + at * 1000, cpu=at % 8, cpu_seq=at + 1, host=f"web-{at % 50}", sk_cookie=at,
            saddr=f"10.0.0.{at % 50}", daddr=f"10.{at % 7}.{at % 200}.9", sport=30_000 + at % 20_000, dport=443,
            unit="nginx.service", pid=at % 3000, comm="nginx", srtt_us=at * 31 % 9973, segs_out=at, segs_in=at // 2,
            total_retrans=at % 11, retrans_fast=at % 7, bytes_sent=at * 1448, start_ns=NOON_NS - at * 777,
        )
        for at in range(first, first + count)
    ]  # fmt: skip


def main(count: int) -> None:
    """Write, export and print."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        for first in range(0, count, _BATCH):
            given = records(first, _BATCH)
            write_spool(folder / "spool" / str(first), FLOWS, given)
            write_container(folder / "avro" / f"{first}.avro", FLOWS, given, "deflate", block_bytes=1 << 18)
        for source in ("spool", "avro"):
            for form in ("parquet", "csv"):
                cpu_s = []
                for _ in range(6):
                    start_s = time.process_time()
                    written = export(Files([folder / source]), folder / "out", form, Period(), frozenset({FLOWS}))
                    cpu_s.append(time.process_time() - start_s)
                print(f"{source} to {form}: {sum(written.values()) / min(cpu_s):,.0f} events/s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
