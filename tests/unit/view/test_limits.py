"""What limits a connection, by the rules of docs/limits.md."""

from typing import Any

import numpy as np
import pytest

from producer.view.limits import LIMITS, Interval, limits, spurious

SECOND = 1_000_000
BUSY = {
    "elapsed_us": SECOND,
    "busy_time_us": SECOND,
    "rwnd_limited_us": 0,
    "sndbuf_limited_us": 0,
    "bytes_sent": 1_400_000,
    "data_segs_out": 1000,
    "total_retrans": 0,
    "dsack_dups": 0,
    "srtt_us": 10_000,
    "min_rtt_us": 9_000,
    "snd_cwnd": 10,
    "mss": 1400,
}
"""A connection that sends a window of 10 segments each round trip of 10 ms."""


def interval(**changed: Any) -> Interval:
    return Interval(**{name: np.array([value]) for name, value in {**BUSY, **changed}.items()})


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "congestion"),
        ({"busy_time_us": 0, "bytes_sent": 0}, "idle"),
        ({"busy_time_us": 0}, "application"),
        ({"busy_time_us": SECOND // 4}, "application"),
        ({"snd_cwnd": 100}, "application"),
        ({"rwnd_limited_us": 6 * SECOND // 10}, "receiver"),
        ({"rwnd_limited_us": 4 * SECOND // 10}, "congestion"),
        ({"sndbuf_limited_us": 6 * SECOND // 10}, "send_buffer"),
        ({"rwnd_limited_us": SECOND // 2, "sndbuf_limited_us": SECOND // 2}, "receiver"),
        ({"total_retrans": 20}, "loss"),
        ({"total_retrans": 20, "bytes_sent": 1400}, "loss"),
        ({"total_retrans": 1}, "congestion"),
        ({"total_retrans": 20, "dsack_dups": 20}, "congestion"),
        ({"total_retrans": 20, "srtt_us": 30_000}, "congestion"),
        ({"total_retrans": 20, "srtt_us": 900, "min_rtt_us": 100}, "loss"),
        ({"total_retrans": 20, "min_rtt_us": 0}, "loss"),
        ({"total_retrans": 20, "busy_time_us": SECOND // 4}, "application"),
        ({"bytes_sent": 0, "data_segs_out": 0}, "loss"),
        ({"bytes_sent": 0, "data_segs_out": 0, "srtt_us": 30_000}, "loss"),
        ({"bytes_sent": 0, "data_segs_out": 0, "rwnd_limited_us": 6 * SECOND // 10}, "receiver"),
    ],
)
def test_each_limit_has_its_rule(changed: dict[str, int], expected: str) -> None:
    assert LIMITS[limits(interval(**changed))[0]] == expected


def test_retransmissions_that_the_peer_had_are_spurious() -> None:
    assert spurious(interval(total_retrans=5, dsack_dups=3)).tolist() == [3]
    assert spurious(interval(total_retrans=5, dsack_dups=9)).tolist() == [5]


def test_connections_are_judged_one_by_one() -> None:
    idle = interval(busy_time_us=0, bytes_sent=0)
    both = Interval(*(np.concatenate(pair) for pair in zip(interval(), idle, strict=True)))
    assert [LIMITS[each] for each in limits(both)] == ["congestion", "idle"]
