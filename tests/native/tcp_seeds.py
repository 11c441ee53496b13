"""Seeds for the fuzzer of native/tcp_counts.c: records of a connection's life, in the layout of fuzz_tcp.c.

python -m tests.native.tcp_seeds FOLDER
"""

import errno
import struct
import sys
from pathlib import Path

import numpy as np

from producer.events import FLOWS, KNOWN, REASONS, ROLES, STATES, Rows

_SEED, _FLOOR_NS = 12345, 1000
_HEAD = struct.Struct("<QqBB")


def seed(rows: Rows, gap: int) -> bytes:
    """Return an input that counts rows, with bytes between them."""
    return _HEAD.pack(_SEED, _FLOOR_NS, len(rows), gap) + bytes(gap).join(row.tobytes() for row in rows)


def life(cookie: int, start_ns: int, role: str, error: int) -> Rows:
    """Return the records of a connection: two on the way, and its last one."""
    rows = np.zeros(3, FLOWS.dtype)
    rows["flow"]["sk_cookie"], rows["start_ns"], rows["role"] = cookie, start_ns, ROLES.index(role)
    rows["ts"], rows["segs_out"] = [2000, 3000, 4000], [5, 9, 20]
    rows["retrans_rto"], rows["srtt_us"] = [0, 1, 2], [40, 2000, 1 << 31]
    rows["known"], rows["state"] = KNOWN["tcp"] | KNOWN["counters"], STATES.index("ESTABLISHED")
    rows["reason"][2] = REASONS.index("close")
    if error:
        rows["known"] |= KNOWN["error"]
        rows["error"], rows["state"] = error, STATES.index("SYN_SENT")
    return rows


def main(folder: Path) -> None:
    """Write a seed of one connection, and one of more than the table has room for."""
    (folder / "one").write_bytes(seed(life(1, 1500, "client", 0), 8))
    lives = [life(each, 900 + 50 * each, "server", errno.ETIMEDOUT if each % 2 else 0) for each in range(6)]
    (folder / "many").write_bytes(seed(np.concatenate(lives), 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
