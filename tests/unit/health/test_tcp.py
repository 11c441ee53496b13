"""Metrics of TCP: what batches of events add up to, however they are cut, and whatever this run has not seen."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.events import CAUSES, FLOWS, KNOWN, REASONS, RETRANSMITS, ROLES, STATES, TRANSMITS, Rows
from producer.health.tcp import ERRORS, TcpMetrics
from tests.support.samples import Samples, samples

SECOND_NS = 10**9
SINCE_NS = 1000 * SECOND_NS
"""The start of the run."""


def record(cookie: int, segs_out: int = 0, *, at_s: float = 1001.0, start_s: float = 1000.5, **fields: Any) -> Rows:
    """Return a record of a connection, by default an interval record of a client's that began in the run."""
    row = np.zeros(1, FLOWS.dtype)
    row["flow"]["sk_cookie"], row["flow"]["netns"] = cookie, 4026531840
    row["ts"], row["start_ns"] = int(at_s * SECOND_NS), int(start_s * SECOND_NS)
    row["segs_out"], row["sample_rate"], row["known"] = segs_out, 1, KNOWN["tcp"] | KNOWN["counters"]
    row["role"], row["state"] = ROLES.index("client"), STATES.index("ESTABLISHED")
    for name, value in fields.items():
        row[name] = value
    return row


def closing(cookie: int, segs_out: int = 0, **fields: Any) -> Rows:
    return record(cookie, segs_out, reason=REASONS.index("close"), **fields)


def failing(cookie: int, error: int, state: str = "SYN_SENT") -> Rows:
    known = KNOWN["tcp"] | (KNOWN["error"] if error else 0)
    return closing(cookie, 1, error=error, known=known, state=STATES.index(state))


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"rebpf_tcp_{name}", tuple(sorted(labels.items()))]


def counted(*batches: Sequence[Rows]) -> Samples:
    metrics = TcpMetrics(SINCE_NS)
    count = metrics.counter(FLOWS)
    assert count
    for batch in batches:
        count(np.concatenate(batch))
    return samples(metrics)


def segments(*batches: Sequence[Rows]) -> float:
    return value(counted(*batches), "segments_total")


def test_before_the_first_event_all_counters_are_zero() -> None:
    metrics = TcpMetrics(SINCE_NS)
    assert samples(metrics) == {}, "nothing is captured"
    for stream in (TRANSMITS, RETRANSMITS, FLOWS):
        metrics.counter(stream)
    found = samples(metrics)

    assert set(found.values()) == {0}
    names = {name.removeprefix("rebpf_tcp_") for name, _ in found}
    assert {"segments_total", "connections_closed_total", "srtt_seconds_bucket", "srtt_seconds_sum"} <= names
    assert {dict(labels)["cause"] for name, labels in found if "retransmitted" in name} == set(CAUSES)
    assert {dict(labels)["role"] for name, labels in found if "opened" in name} == {"client", "server"}
    failed = {(dict(labels)["phase"], dict(labels)["error"]) for name, labels in found if "failed" in name}
    assert failed == {(phase, error) for phase in ("connect", "established") for error in ERRORS} | {
        ("connect", "none")
    }


def test_the_records_of_a_connection_add_up_to_its_last_one() -> None:
    assert segments([record(7, 10)], [record(7, 10)], [record(7, 25)], [closing(7, 31)]) == 31
    assert segments([record(7, 10), closing(7, 31)]) == 31
    assert segments([closing(7, 31)]) == 31


def test_an_older_connection_counts_from_its_first_record_in_the_run() -> None:
    for start_s in (0, 999.9):
        assert segments([record(7, 1000, start_s=start_s)], [closing(7, 1001, start_s=start_s)]) == 1
        assert segments([closing(7, 1001, start_s=start_s)]) == 0
    opened = counted([record(7, 1000, start_s=999.9)], [closing(7, 1001, start_s=999.9)])
    assert value(opened, "connections_opened_total", role="client") == 0
    assert value(opened, "connections_closed_total") == 1


def test_a_socket_that_connects_again_is_another_connection() -> None:
    again = [record(7, 3, start_s=1002), closing(7, 5, start_s=1002)]
    for batches in (
        ([closing(7, 10), *again],),
        ([closing(7, 10)], again),
        *([[closing(7, 10)], [each]] for each in again),
    ):
        found = counted(*batches)
        assert value(found, "connections_opened_total", role="client") == 2
        assert value(found, "segments_total") == 10 + (5 if len(batches[-1]) > 1 else batches[-1][0]["segs_out"][0])


def test_the_syn_acks_of_an_accepted_connection_are_segments_too() -> None:
    assert segments([closing(7, 10, role=ROLES.index("server"), retrans_syn_ack=2, total_retrans=2)]) == 13


def test_a_record_that_was_lost_loses_nothing_and_an_old_one_adds_nothing() -> None:
    assert segments([record(7, 10)], [closing(7, 99)]) == 99
    assert segments([record(7, 10)], [record(7, 8)], [record(7, 12)]) == 12


def test_a_counter_of_the_kernel_that_wraps_goes_on() -> None:
    assert segments([record(7, (1 << 32) - 5, start_s=0)], [closing(7, 3, start_s=0)]) == 8


@dataclass(frozen=True)
class Life:
    """A connection: its segments at each record, whether it closes, and whether it began in the run."""

    totals: list[int]
    closes: bool
    is_new: bool
    is_server: bool

    def rows(self, cookie: int) -> list[Rows]:
        role = ROLES.index("server" if self.is_server else "client")
        start_s = 1000.5 if self.is_new else 0.0
        rows = [record(cookie, total, role=role, start_s=start_s, retrans_rto=total // 3) for total in self.totals]
        if self.closes:
            rows[-1]["reason"] = REASONS.index("close")
        return rows

    @property
    def expected(self) -> tuple[int, int]:
        """The segments that count, and those of them retransmitted."""
        first = 0 if self.is_new else self.totals[0]
        return self.totals[-1] - first + (self.is_new and self.is_server), self.totals[-1] // 3 - first // 3


lives = st.builds(
    Life,
    st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4).map(sorted),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(lives, min_size=1, max_size=12), st.randoms(use_true_random=False), st.integers(0, 3))
def test_however_records_are_mixed_and_cut_into_batches_their_sums_are_the_connections(
    connections: list[Life], random: Any, cuts: int
) -> None:
    queues = [life.rows(cookie) for cookie, life in enumerate(connections, 1)]
    order = [number for number, rows in enumerate(queues) for _ in rows]
    random.shuffle(order)
    rows = [queues[number].pop(0) for number in order]
    ends = sorted({0, len(rows), *(random.randint(0, len(rows)) for _ in range(cuts))})
    found = counted(*[rows[start:end] for start, end in pairwise(ends)])

    expected = np.array([life.expected for life in connections])
    assert value(found, "segments_total") == expected[:, 0].sum()
    assert value(found, "retransmitted_segments_total", cause="rto") == expected[:, 1].sum()
    opened = [value(found, "connections_opened_total", role=role) for role in ("client", "server")]
    new = [life.is_server for life in connections if life.is_new]
    assert opened == [new.count(False), new.count(True)]
    assert value(found, "connections_closed_total") == sum(life.closes for life in connections)


def added(metrics: TcpMetrics, *rows: Rows) -> tuple[float, float]:
    """Return the segments and the opened connections that a batch adds."""
    count = metrics.counter(FLOWS)
    assert count
    before, _, after = samples(metrics), count(np.concatenate(rows)), samples(metrics)
    opened = [value(found, "connections_opened_total", role="client") for found in (before, after)]
    return value(after, "segments_total") - value(before, "segments_total"), opened[1] - opened[0]


def test_connections_that_the_table_has_no_space_for_count_once_when_they_close() -> None:
    metrics = TcpMetrics(SINCE_NS, most=3)
    cookies = range(1, 8)
    for total in (10, 20):
        assert added(metrics, *(record(cookie, total) for cookie in cookies)) == (30, 3 if total == 10 else 0)
    assert added(metrics, *(closing(cookie, 21) for cookie in cookies)) == (3 * 1 + 4 * 21, 4)
    assert value(samples(metrics), "connections_closed_total") == 7
    assert added(metrics, record(8, 10)) == (10, 1), "there is room again"


def test_equal_cookies_of_two_namespaces_are_two_connections() -> None:
    other = record(7, 5)
    other["flow"]["netns"] += 1
    assert added(TcpMetrics(SINCE_NS), record(7, 10), other) == (15, 2)


def test_older_sockets_without_a_cookie_are_several_connections() -> None:
    """Linux before 5.12 with fentry: the cookie is 0, and so is the unknown start."""
    rows = [closing(0, total, start_s=0) for total in (10, 10**6, 5)]
    for row, sport, peer in zip(rows, (50_000, 50_001, 50_000), (1, 1, 2), strict=True):
        row["flow"]["sport"], row["flow"]["daddr"][:, -1] = sport, peer
    found = counted(*[[row] for row in rows])
    assert (value(found, "connections_closed_total"), value(found, "segments_total")) == (3, 0)


@pytest.mark.slow
def test_closed_connections_are_forgotten_after_a_second_on_a_host_that_closes_many() -> None:
    metrics = TcpMetrics(SINCE_NS)
    for batch in range(40):
        at_s, cookies = 1001 + batch / 2, range(1000 * batch, 1000 * (batch + 1))
        closed = [closing(cookie, 5, at_s=at_s, start_s=at_s - 0.1) for cookie in cookies]
        late = [record(cookie, 4, at_s=at_s - 0.01, start_s=at_s - 0.1) for cookie in cookies[::10]]
        assert added(metrics, *closed) == (5000, 1000)
        assert added(metrics, *late) == (0, 0)
    assert len(metrics._table) < 10_000


def test_a_full_table_forgets_connections_whose_end_was_lost_and_counts_none_of_them_twice() -> None:
    metrics = TcpMetrics(SINCE_NS, most=2)
    added(metrics, record(1, 10), record(2, 10))
    late = {"at_s": 1700.0, "start_s": 1699.0}
    assert added(metrics, record(3, 5, **late)) == (5, 1)
    assert added(metrics, closing(1, 15, at_s=1701.0)) == (0, 0), "it counts like an older one"
    assert added(metrics, closing(3, 6, **late)) == (1, 0)


def test_retransmissions_are_segments_by_cause_weighted_by_the_sample_rate() -> None:
    metrics = TcpMetrics(SINCE_NS)
    of_flows, of_retransmits = metrics.counter(FLOWS), metrics.counter(RETRANSMITS)
    assert of_flows
    assert of_retransmits
    rows = np.zeros(4, RETRANSMITS.dtype)
    rows["cause"] = [CAUSES.index("rto"), CAUSES.index("tlp"), CAUSES.index("rto"), 200]
    rows["s"]["segs"] = [1, 2, 45, 1]
    rows["s"]["sample_rate"] = [1, 1, 20, 1]
    of_retransmits(rows)
    of_flows(closing(7, 100, retrans_rto=50))
    found = samples(metrics)

    by_cause = {cause: value(found, "retransmitted_segments_total", cause=cause) for cause in CAUSES}
    assert by_cause == {**dict.fromkeys(CAUSES, 0), "rto": 901, "tlp": 2, "other": 1}


def test_the_repeated_syn_acks_of_a_flood_are_segments_too_and_those_of_connections_count_once() -> None:
    metrics = TcpMetrics(SINCE_NS)
    of_flows, of_retransmits = metrics.counter(FLOWS), metrics.counter(RETRANSMITS)
    assert of_flows
    assert of_retransmits
    rows = np.zeros(5, RETRANSMITS.dtype)
    rows["cause"], rows["s"]["segs"], rows["s"]["sample_rate"] = CAUSES.index("syn_ack"), 1, 1
    of_retransmits(rows)
    of_flows(closing(7, 10, role=ROLES.index("server"), retrans_syn_ack=2, total_retrans=2))
    assert value(samples(metrics), "segments_total") == 10 + 1 + 5


def test_failures_are_by_error_of_a_bounded_list_and_by_phase() -> None:
    rows = [
        failing(1, errno.ECONNREFUSED),
        failing(2, errno.ECONNREFUSED),
        failing(3, errno.ETIMEDOUT),
        failing(4, errno.ETIMEDOUT, "ESTABLISHED"),
        failing(5, errno.ENOMEM, "CLOSE_WAIT"),
        failing(6, 1 << 31, "ESTABLISHED"),
        failing(7, 0),
        failing(8, 0, "ESTABLISHED"),
        record(9, 1, error=errno.EPIPE),
    ]
    found = counted(rows)

    failed = {labels: count for (name, labels), count in found.items() if name.endswith("failed_total") and count}
    assert failed == {
        (("error", "ECONNREFUSED"), ("phase", "connect")): 2,
        (("error", "ETIMEDOUT"), ("phase", "connect")): 1,
        (("error", "none"), ("phase", "connect")): 1,
        (("error", "ETIMEDOUT"), ("phase", "established")): 1,
        (("error", "other"), ("phase", "established")): 2,
    }
    assert value(found, "connections_closed_total") == 8


def test_round_trips_are_those_of_connections_that_sent_something() -> None:
    found = counted(
        [record(1, 5, srtt_us=50), record(2, 5, srtt_us=51), record(3, 5, srtt_us=0), record(4, 5, known=0, srtt_us=9)],
        [record(1, 5, srtt_us=50), closing(2, 6, srtt_us=7_000_000)],
    )
    assert value(found, "srtt_seconds_bucket", le="5e-05") == 1
    assert value(found, "srtt_seconds_bucket", le="0.0001") == 2
    assert value(found, "srtt_seconds_bucket", le="5.0") == 2
    assert value(found, "srtt_seconds_bucket", le="+Inf") == value(found, "srtt_seconds_count") == 3
    assert value(found, "srtt_seconds_sum") == pytest.approx(7.000101)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=50))
def test_rows_of_damaged_memory_break_nothing(seeds: list[int]) -> None:
    metrics = TcpMetrics(SINCE_NS)
    for stream in (FLOWS, RETRANSMITS):
        count = metrics.counter(stream)
        assert count
        size = stream.dtype.itemsize
        content = b"".join(np.random.default_rng(seed).bytes(size) for seed in seeds)
        count(np.frombuffer(content, stream.dtype))
    assert samples(metrics)
