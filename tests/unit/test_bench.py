"""The benchmark's consumer and baseline read events as they were written."""

import numpy as np
import pytest

from producer.events import FLOWS, STREAMS, TRANSMITS, Batch, common
from producer.health.tcp import TcpMetrics
from tests.bench import fleet, replay, stages
from tests.bench.baseline import flattened
from tests.bench.goagent.rows import random_rows
from tests.bench.reader import ts_ns
from tests.support.samples import samples


def test_the_events_time_is_read_from_the_message():
    rows = stages.rows()
    rows["s"]["ts"][:3] = [0, 1, 63]
    messages = stages.messages(stages.encoder().encode(Batch(TRANSMITS, rows), stages.UTC_OFFSET_NS))

    assert [ts_ns(each) for each in messages] == (rows["s"]["ts"] + stages.UTC_OFFSET_NS).tolist()


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_the_baseline_unpacks_rows_of_the_ring(stream):
    layout, names = flattened(stream.dtype)
    rows = random_rows(stream, 3, np.random.default_rng(1))
    unpacked = [dict(zip(names, layout.unpack(row.tobytes()), strict=True)) for row in rows]

    assert [each["cpu_seq"] for each in unpacked] == common(rows)["cpu_seq"].tolist()
    assert [each["rules_version"] for each in unpacked] == common(rows)["rules_version"].tolist()


def test_a_fleets_figures_are_those_of_a_host_times_its_hosts_replicas_and_retention():
    rates = {TRANSMITS.topic: 3e6, FLOWS.topic: 1e6}
    cost = fleet.Cost(cpu=0.125, records={TRANSMITS.topic: 20_000.4}, stored_bytes=rates)
    kept = 3 * 1000 * (3e6 * 86_400 + 1e6 * 30 * 86_400)

    cells = "quiet", "full", "12.5%", "tcp_transmit 20,000", "4,000.0", "4,000.0", f"{kept / 1e12:,.1f}"
    assert fleet.row("quiet", "full", cost, hosts=1000) == f"| {' | '.join(cells)} |"


def test_replayed_rows_are_ends_of_connections_with_some_segments_each():
    random = np.random.default_rng(1)
    flows, transmits = (replay.rows(stream, 3, 20, random) for stream in (FLOWS, TRANSMITS))

    assert flows["cpu_seq"].tolist() == transmits["s"]["cpu_seq"].tolist() == list(range(3, 23))
    assert len(set(flows["flow"]["sk_cookie"].tolist())) == 20
    assert np.unique(transmits["s"]["flow"]["sk_cookie"], return_counts=True)[1].max() == replay.SEGMENTS
    metrics = TcpMetrics(since_ns=1)
    count = metrics.counter(FLOWS)
    count(flows)
    found = samples(metrics)
    assert found["rebpf_tcp_segments_total", ()] == 20 * replay.SEGMENTS + 10, "with the servers' SYN-ACKs"
    assert found["rebpf_tcp_connections_closed_total", ()] == 20
