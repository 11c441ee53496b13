"""What limits a connection, from the kernel's own figures over an interval. docs/limits.md explains the rules."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer.events import Ints

LIMITS = ("idle", "application", "receiver", "send_buffer", "congestion", "loss")
"""Names by number."""
IDLE, APPLICATION, RECEIVER, SEND_BUFFER, CONGESTION, LOSS = range(len(LIMITS))

_BUSY_SHARE = 0.5
"""A connection with nothing to send for longer than this share of the time waits for its application."""
_WINDOW_SHARE = 0.5
"""The same if it uses less than this share of its congestion window."""
_LOSS_RATIO = 0.001
_QUEUE_FACTOR = 2.0
_QUEUE_US = 2000.0
"""A round trip above twice the shortest one, and 2 ms, is spent in a queue. Losses then come from its overflow."""

Numbers = Ints | NDArray[np.float64]


class Interval(NamedTuple):
    """Growth of the kernel's counters over an interval, and gauges at its end; times in microseconds.

    A `min_rtt_us` of 0 is unknown.
    """

    elapsed_us: Numbers
    busy_time_us: Numbers
    rwnd_limited_us: Numbers
    sndbuf_limited_us: Numbers
    bytes_sent: Numbers
    data_segs_out: Numbers
    total_retrans: Numbers
    dsack_dups: Numbers
    srtt_us: Numbers
    min_rtt_us: Numbers
    snd_cwnd: Numbers
    mss: Numbers


def spurious(interval: Interval) -> Numbers:
    """Return the retransmitted segments that the peer already had, as it reported by DSACK."""
    return np.minimum(interval.dsack_dups, interval.total_retrans)


def limits(interval: Interval) -> Ints:
    """Return what limited each connection, as an index of LIMITS."""
    busy = interval.busy_time_us
    network = busy - interval.rwnd_limited_us - interval.sndbuf_limited_us
    lost = interval.total_retrans - spurious(interval)
    lossy = lost > _LOSS_RATIO * interval.data_segs_out
    queue = interval.srtt_us - interval.min_rtt_us
    queued = (interval.min_rtt_us > 0) & (queue > (_QUEUE_FACTOR - 1) * interval.min_rtt_us) & (queue > _QUEUE_US)
    # Busy for most of the time, and nothing was sent: acknowledgements are missing, and the timer has backed off.
    stalled = interval.bytes_sent <= 0
    # Little's law: bytes in flight are the rate times the round trip.
    in_flight = interval.bytes_sent / np.maximum(interval.elapsed_us, 1) * interval.srtt_us
    fills_window = in_flight >= _WINDOW_SHARE * interval.snd_cwnd * interval.mss
    choices = [
        ((busy <= 0) & (interval.bytes_sent <= 0), IDLE),
        (busy < _BUSY_SHARE * interval.elapsed_us, APPLICATION),
        ((interval.rwnd_limited_us > network) & (interval.rwnd_limited_us >= interval.sndbuf_limited_us), RECEIVER),
        (interval.sndbuf_limited_us > network, SEND_BUFFER),
        (stalled | (lossy & ~queued), LOSS),
        (lossy | fills_window, CONGESTION),
    ]
    return np.select([chosen for chosen, _ in choices], [name for _, name in choices], APPLICATION)
