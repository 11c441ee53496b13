"""The demo's summary: segments by path, worst first."""

from typing import Any

from producer.demo.summary import Paths


def event(sport: int, dport: int, segs: int, **fields: Any) -> dict[str, Any]:
    return {"saddr": "10.0.0.1", "daddr": "10.0.0.2", "sport": sport, "dport": dport, "segs": segs, **fields}


def test_paths_are_ordered_by_their_retransmitted_segments_and_name_the_servers_port() -> None:
    paths = Paths()
    for record in (
        event(40_000, 5001, 90),
        event(40_001, 5001, 10),
        event(40_001, 5001, 3, cause="rto"),
        event(5002, 40_002, 50),
        event(5002, 40_002, 4, cause="fast"),
        event(5002, 40_002, 1, cause="tlp"),
        event(40_003, 80, 7),
        {"saddr": "10.0.0.1", "total_retrans": 5},
    ):
        paths.add(record)
    worst = [(path.port, path.retransmitted, path.ratio, dict(path.causes)) for path in paths.worst(9)]
    assert worst == [(5002, 5, 0.1, {"fast": 4, "tlp": 1}), (5001, 3, 0.03, {"rto": 3})]
    assert len(paths.worst(1)) == 1
