"""The metrics of TCP against plain Python over the same records, of any values, batches and memory layout."""

import errno
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.connections import Connections
from producer.events import CAUSES, FLOWS, KNOWN, REASONS, ROLES, STATES, Rows
from producer.health.tcp import ERRORS, TcpMetrics
from tests.support.samples import Samples, samples

SECOND_NS = 10**9
SINCE_NS = 1000 * SECOND_NS
BOUNDS_US = (50, 100, 250, 500, 1000, 2500, 5000, 10**4, 25 * 10**3, 5 * 10**4, 10**5, 25 * 10**4, 5 * 10**5, 10**6,
             25 * 10**5, 5 * 10**6)  # fmt: skip
WRAP = 1 << 32


class Oracle:
    """What the samples are, by the definition of each metric, a record at a time."""

    def __init__(self) -> None:
        self.highest: dict[tuple[int, int], list[int]] = {}
        self.closed: set[tuple[int, int]] = set()
        self.counts: Counter[str] = Counter()

    def take(self, row: Any) -> None:
        key = int(row["flow"]["sk_cookie"]), int(row["start_ns"])
        is_server = row["role"] == ROLES.index("server")
        sent = int(row["segs_out"]) + int(row["retrans_syn_ack"]) + int(is_server)
        now = [sent % WRAP, *(int(row[f"retrans_{cause}"]) for cause in CAUSES)]
        more = self.growth(key, now)
        if key not in self.highest and key[1] >= SINCE_NS:
            role = int(row["role"])
            self.counts[f"opened {ROLES[role] if role < len(ROLES) else 'unknown'}"] += 1
        highest = self.highest.setdefault(key, list(now))
        for place, each in enumerate(more):
            self.counts[f"more {place}"] += each
            highest[place] = now[place] if each else highest[place]
        if row["reason"] == REASONS.index("close") and key not in self.closed:
            self.closed.add(key)
            self.close(row)
        if more[0] and row["known"] & KNOWN["tcp"] and row["srtt_us"]:
            self.counts[f"srtt {next((at for at in BOUNDS_US if row['srtt_us'] <= at), 'more')}"] += 1
            self.counts["srtt sum"] += int(row["srtt_us"])

    def growth(self, key: tuple[int, int], now: Sequence[int]) -> list[int]:
        if key not in self.highest:
            return list(now) if key[1] >= SINCE_NS else [0] * len(now)
        differences = [(each - before) % WRAP for each, before in zip(now, self.highest[key], strict=True)]
        return [each if each < WRAP // 2 else 0 for each in differences]

    def close(self, row: Any) -> None:
        self.counts["closed"] += 1
        phase = "connect" if row["state"] == STATES.index("SYN_SENT") else "established"
        if row["known"] & KNOWN["error"]:
            name = errno.errorcode.get(int(row["error"]), "other")
            self.counts[f"failed {phase} {name if name in ERRORS else 'other'}"] += 1
        elif phase == "connect":
            self.counts["failed connect none"] += 1

    def samples(self) -> Samples:
        count = self.counts
        found: Samples = {
            ("rebpf_tcp_segments_total", ()): count["more 0"],
            ("rebpf_tcp_connections_closed_total", ()): count["closed"],
            ("rebpf_tcp_srtt_seconds_sum", ()): count["srtt sum"] / 1e6,
        }
        for place, cause in enumerate(CAUSES, 1):
            found["rebpf_tcp_retransmitted_segments_total", (("cause", cause),)] = count[f"more {place}"]
        for role in ("client", "server"):
            found["rebpf_tcp_connections_opened_total", (("role", role),)] = count[f"opened {role}"]
        for phase, error in [("connect", "none"), *((p, e) for p in ("connect", "established") for e in ERRORS)]:
            labels = ("error", error), ("phase", phase)
            found["rebpf_tcp_connections_failed_total", labels] = count[f"failed {phase} {error}"]
        total = 0
        for at in BOUNDS_US:
            total += count[f"srtt {at}"]
            found["rebpf_tcp_srtt_seconds_bucket", (("le", str(at / 1e6)),)] = total
        total += count["srtt more"]
        found["rebpf_tcp_srtt_seconds_bucket", (("le", "+Inf"),)] = total
        found["rebpf_tcp_srtt_seconds_count", ()] = total
        return found


numbers = st.integers(0, WRAP - 1) | st.sampled_from([0, 1, WRAP // 2, WRAP - 1])
growths = st.integers(0, WRAP // 64 - 1) | st.integers(0, 5)
"""Of 25 records in all less than half the range: an older record again could not be told from a later one otherwise."""
values = st.fixed_dictionaries(
    {
        "role": st.integers(0, 4),
        "reason": st.integers(0, 2),
        "state": st.integers(0, 4),
        "known": st.sampled_from([0, KNOWN["tcp"], KNOWN["error"], KNOWN["tcp"] | KNOWN["error"]]),
        "error": st.sampled_from([0, 255, 256, WRAP - 1, *errno.errorcode]),
        "srtt_us": st.sampled_from([*BOUNDS_US, *(at + 1 for at in BOUNDS_US), 0, 1, WRAP - 1]),
    }
)


@st.composite
def histories(draw: st.DrawFn) -> list[Rows]:
    """Records of some connections, with counters that grow and wrap, and now and then an older record again."""
    made: list[Rows] = []
    last: dict[tuple[int, int], Rows] = {}
    for at in range(draw(st.integers(1, 25))):
        key = draw(st.integers(1, 4)), draw(st.sampled_from([0, SINCE_NS - 1, SINCE_NS, SINCE_NS + SECOND_NS]))
        row = last[key].copy() if key in last else np.zeros(1, FLOWS.dtype)
        row["flow"]["sk_cookie"], row["start_ns"] = key
        row["ts"] = SINCE_NS + (2 + at) * SECOND_NS
        for name, value in draw(values).items():
            row[name] = value
        for name in ("segs_out", *(f"retrans_{cause}" for cause in CAUSES if cause != "syn_ack")):
            more = draw(growths if key in last else numbers)
            row[name] = (int(row[name][0]) + more) % WRAP
        # An older connection that closes, and whose counters fall, is taken for another one.
        row["reason"] = 0 if key[1] == 0 else row["reason"]
        # What a server's SYN-ACK adds must not make the sum fall.
        row["role"] = last[key]["role"] if key in last else row["role"]
        last[key] = row
        made.append(row)
        if draw(st.integers(0, 4)) == 0:
            made.append(draw(st.sampled_from(made)))
    return made


@settings(max_examples=60, deadline=None)
@given(histories(), st.lists(st.integers(0, 30), max_size=4), st.sampled_from([0, 1, 8]))
def test_the_samples_are_those_of_plain_python(records: list[Rows], cuts: list[int], gap: int) -> None:
    rows = np.concatenate(records)
    apart = np.zeros(len(rows), [("row", rows.dtype), ("gap", "u1", gap)])
    apart["row"] = rows
    metrics, oracle = TcpMetrics(SINCE_NS), Oracle()
    count = metrics.counter(FLOWS)
    assert count
    for first, end in pairwise(sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})):
        count(apart["row"][first:end])
    for row in rows:
        oracle.take(row)
    assert samples(metrics) == pytest.approx(oracle.samples())


def test_arrays_of_other_sizes_are_refused() -> None:
    names = ("segs_out", *(f"retrans_{cause}" for cause in CAUSES))
    right: list[Any] = [
        np.zeros(2, FLOWS.dtype), np.zeros(256, np.uint8), np.zeros(16, np.int64), np.zeros(51, np.int64)
    ]  # fmt: skip

    def refuses(message: str, place: int, wrong: Any, counters: tuple[str, ...] = names) -> None:
        rows, errors, bounds, counts = [*right[:place], wrong, *right[place + 1 :]]
        with pytest.raises(ValueError, match=message):
            Connections(counters, 0, 9).count_flows(rows, errors, bounds, counts)

    refuses("one dimension of 336 bytes", 0, np.zeros(2, "V335"))
    refuses("of another size", 0, right[0], names[1:])
    refuses("of another size", 1, np.zeros(255, np.uint8))
    refuses("error 7 has an index above", 1, np.where(np.arange(256) == 7, 10, 0).astype("u1"))
    refuses("of another size", 2, np.zeros(15, np.int64))
    refuses("of another size", 3, np.zeros(50, np.int64))
