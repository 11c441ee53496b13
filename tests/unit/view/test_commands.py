"""`rebpf trace -r` and the options of both views, as a user runs them."""

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from producer.commands import trace as tracing
from producer.commands.export import export
from producer.commands.trace import Output, Summary, from_file, judged, live, trace
from producer.consume.period import Period
from producer.events import FLOWS, KNOWN, RETRANSMITS, TRANSMITS
from producer.export.sources import Files
from producer.view.file import RecordFile
from producer.view.filter import parse
from producer.view.line import Lines
from producer.view.records import Records, in_order
from tests.support.analysis import record, write_container, write_spool
from tests.support.encoding import OFFSET_NS
from tests.support.rebpf import DEADLINE_S, command, rebpf
from tests.support.views import decoded, flows, retransmits, transmits

ENDS = {"saddr": "10.0.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51234, "sk_cookie": 5}
SECOND_NS = 1_000_000_000
SEGMENTS = decoded(
    RETRANSMITS,
    retransmits(
        *({**ENDS, "cause": "rto", "ts": number * SECOND_NS, "retransmit_no": 1} for number in range(3)),
        {**ENDS, "cause": "tlp", "daddr": "10.2.0.8", "sk_cookie": 6, "ts": 3 * SECOND_NS, "segs": 9},
    ),
)
CONNECTIONS = decoded(
    FLOWS,
    flows(
        {
            **ENDS, "reason": "interval", "ts": SECOND_NS, "start_ns": SECOND_NS, "unknown": 1 << 12,
            "min_rtt_us": 100, "srtt_us": 110,
        },
        {
            **ENDS, "reason": "close", "ts": 2 * SECOND_NS, "start_ns": SECOND_NS, "unknown": 1 << 12,
            "busy_time_us": 1_000_000, "data_segs_out": 100, "total_retrans": 9, "dsack_dups": 2, "bytes_sent": 9,
            "min_rtt_us": 100, "srtt_us": 110, "comm": "nginx",
        },
    ),
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = RecordFile(tmp_path / "file")
    file.write(in_order([SEGMENTS]))
    file.write(in_order([CONNECTIONS]))
    file.close()
    return tmp_path / "file"


def test_a_file_is_shown_filtered_and_counted(file: Path) -> None:
    done = rebpf("trace", "-r", file, "-c", "cause", "rto", "or", "comm", "nginx")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("-- 2026-"), "the day of what was recorded"
    assert [line.split()[1] for line in (lines[0], *lines[2:5])] == ["CAUSE", "rto", "rto", "rto"]
    assert lines[5] == "1 flow with retransmissions or an error"
    assert lines[7].split() == ["3", "2", "loss", "nginx", "rto=3", "10.0.0.1:443", ">", "10.2.0.9:51234"]


def test_how_a_connection_failed_is_in_the_counts(tmp_path: Path) -> None:
    failed = {**ENDS, "reason": "close", "ts": SECOND_NS, "start_ns": SECOND_NS}
    file = RecordFile(tmp_path / "file")
    refused = {"state": "SYN_SENT", "error": 111, "sk_cookie": 7}
    given_up = {"state": "SYN_SENT", "unknown": KNOWN["error"], "sk_cookie": 8}
    for each in (refused, given_up, {"state": "ESTABLISHED", "error": 104, "sk_cookie": 9}):
        file.write(in_order([decoded(FLOWS, flows({**failed, **each}))]))
    file.close()
    done = rebpf("trace", "-r", tmp_path / "file", "-c")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[5] == "3 flows with retransmissions or errors"
    assert [" ".join(line.split()[4:6]) for line in lines[7:]] == [
        "connect ECONNREFUSED",
        "connect closed",
        "close ECONNRESET",
    ]
    assert lines[7].split()[:3] == ["0", "-", "-"], "nothing limits what was never established"


def test_events_of_several_streams_are_in_order_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent = transmits(*({**ENDS, "ts": number * SECOND_NS} for number in (2, 6)))
    lost = retransmits({**ENDS, "cause": "rto", "ts": 4 * SECOND_NS, "segs": 2, "sample_rate": 50})
    failed = flows({**ENDS, "reason": "close", "state": "SYN_SENT", "error": 111, "ts": 3 * SECOND_NS})
    batch = [decoded(RETRANSMITS, lost), decoded(FLOWS, failed), decoded(TRANSMITS, sent)]
    file, output = RecordFile(tmp_path / "file"), Output(Lines(120, hosts=False, color=False), False, None, True, 120)
    trace([batch], parse(""), output, threading.Event(), file)
    file.close()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown[2:6]] == ["sent", "connect", "rto", "sent"]
    assert shown[-1].split()[0] == "100", "what was sampled stands for others"
    replayed = rebpf("trace", "-r", tmp_path / "file").stdout.splitlines()
    assert [line.split()[1] for line in replayed[2:6]] == ["sent", "connect", "rto", "sent"]


class Rings(contextlib.nullcontext[None]):
    """A source whose reads return these batches."""

    def __init__(self, *batches: list[Records]) -> None:
        super().__init__()
        self.batches = list(batches)
        self.reports = 0

    def report(self) -> None:
        self.reports += 1

    def read(self) -> list[Records]:
        return self.batches.pop(0)

    def lost(self) -> int:
        return 0


def test_an_event_that_is_later_than_the_read_of_another_ring_waits_for_the_next() -> None:
    now_ns, stop = time.time_ns() - OFFSET_NS, threading.Event()
    lost = [decoded(RETRANSMITS, retransmits({"cause": "rto", "ts": now_ns + at * SECOND_NS})) for at in (-9, -8, 60)]
    sent = decoded(TRANSMITS, transmits({"ts": now_ns + 30 * SECOND_NS}))
    batches = live(Rings([lost[0], sent], [lost[1]], [lost[2]]), stop)
    shown = [[stream for stream, _ in in_order(next(batches))] for _ in range(2)]
    stop.set()
    shown.append([stream for stream, _ in in_order(next(batches))])
    assert shown == [[RETRANSMITS], [RETRANSMITS, TRANSMITS], [RETRANSMITS]]


def test_open_connections_are_reported_at_intervals_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rings, stop = Rings(*([] for _ in range(4))), threading.Event()
    monkeypatch.setattr(tracing, "_REPORT_S", 0.0)
    batches = live(rings, stop)
    for count in (1, 2, 3):
        assert (next(batches), rings.reports) == ([], count)
    stop.set()
    assert (next(batches), rings.reports) == ([], 4)


def test_json_lines_end_with_the_counts(file: Path) -> None:
    done = rebpf("trace", "-r", file, "-c", "-n", 2, "--json")
    *events, counts = map(json.loads, done.stdout.splitlines())
    assert [event["cause"] for event in events] == ["rto", "rto"]
    assert all(event["topic"] == "tcp_retransmit" for event in events)
    assert [flow["retransmitted"] for flow in counts["flows"]] == [2], "not more than what is shown"


@pytest.mark.slow
def test_parquet_and_spool_files_are_shown_like_avro(tmp_path: Path) -> None:
    records = [record(RETRANSMITS, cause="rto", daddr="10.2.0.9", cpu_seq=number) for number in (1, 2)]
    avro = write_container(tmp_path / "events.avro", RETRANSMITS, records)
    (spooled,) = write_spool(tmp_path / "spool", RETRANSMITS, records).iterdir()
    (parquet,) = export(Files([avro]), tmp_path / "export", "parquet", Period(), frozenset({RETRANSMITS}))
    shown = [rebpf("trace", "-r", path, "-c", "peer", "10.2.0.0/16").stdout for path in (avro, spooled, parquet)]
    assert shown[0].count(" rto ") == 2
    assert shown[0] == shown[1] == shown[2]


def test_a_period_of_a_file_is_shown(file: Path) -> None:
    assert len(rebpf("trace", "-r", file, "--until", "1971-01-01").stdout.splitlines()) == 1
    assert len(rebpf("trace", "-r", file, "--since", "1971-01-01").stdout.splitlines()) == 6
    first = SEGMENTS["ts_ns"].cells[0]
    found = from_file(file, Period(first + 1, first + 2 * SECOND_NS), threading.Event())
    assert [len(records) for batch in found for records in batch if records.stream == RETRANSMITS] == [1]


def test_a_full_disk_is_one_line(file: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("trace", "-r", file), stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S
        )
    assert done.returncode == 74
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


@pytest.mark.parametrize("view", ["trace", "top", "tail"])
def test_a_wrong_filter_is_answered_with_a_caret(view: str) -> None:
    done = rebpf(view, "host web-1 and cause rot")
    assert (done.returncode, done.stdout) == (64, "")
    first, text, caret = done.stderr.splitlines()
    assert first.startswith("rebpf: filter: expected one of other, rto")
    assert text[caret.index("^") :] == "rot"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trace", "-r", "x", "--transmit"], "leave out --transmit"),
        (["trace", "--since", "1h"], "need -r"),
        (["trace", "-r", "/dev/null", "--since", "1h", "--until", "2h"], "--since must be before --until"),
        (["trace", "-r", "/dev/null", "--since", "1h", "--until", "60m"], "--since must be before --until"),
        (["tail", "--brokers", "k:1", "--since", "1h", "--until", "2h"], "--since must be before --until"),
        (["report", "--brokers", "k:1", "--since", "1h", "--until", "2h", "-o", "r"], "--since must be before --until"),
        (["top", "--json"], "needs --once"),
        (["top", "--brokers", "k:1", "--window", "1"], "at least 10"),
        (["trace", "-r", "/no/such/file"], "No such file"),
    ],
)
def test_wrong_options_have_one_line(arguments: list[str], expected: str) -> None:
    done = rebpf(*arguments)
    assert done.returncode in (64, 69)
    assert expected in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) <= 3


def test_limits_are_judged_between_two_records_or_since_the_start() -> None:
    first, last = CONNECTIONS.rows()
    assert judged(first, last) == ("loss", 2)
    assert judged(last, last) == ("loss", 2)
    assert judged(None, {**last, "start_ns": None}) == (None, None)
    assert judged(None, None) == judged(first, {**last, "state": "SYN_SENT"}) == (None, None)
    assert judged(first, {**last, "busy_time_us": None}) == (None, None)


@pytest.mark.parametrize("name", ["data_segs_out", "total_retrans", "dsack_dups"])
def test_counters_of_32_bits_may_wrap_between_two_records(name: str) -> None:
    first, last = CONNECTIONS.rows()
    most = (1 << 32) - 1
    wrapped = {**last, name: (last[name] + most) % (1 << 32)}
    assert judged({**first, name: (first[name] + most) % (1 << 32)}, wrapped) == judged(first, last)


def test_a_socket_that_connects_again_is_judged_since_then() -> None:
    first, last = CONNECTIONS.rows()
    again = {**last, "start_ns": first["ts_ns"] + 1}
    assert judged({**first, "total_retrans": 1 << 20, "dsack_dups": 1 << 20}, again) == judged(None, again)


def test_the_summary_shows_the_worst_flow_first(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = Summary()
    summary.add(in_order([SEGMENTS]))
    rows = summary.rows()
    assert [row["retransmitted"] for row in rows] == [9, 3]
    assert rows[1]["causes"] == {"rto": 3}
    assert rows[0]["limit"] is None
    wide, narrow = (summary.text(width, as_json=False).splitlines() for width in (120, 80))
    assert wide[2].endswith(" tlp=9 10.0.0.1:443 > 10.2.0.8:51234")
    assert max(map(len, narrow)) <= 80
    narrower = summary.text(72, as_json=False).splitlines()
    assert narrower[2].endswith(" tlp=9 10.2.0.8:51234")
    causes = ("rto", "fast", "fast", "slow_start", "tlp", "syn")
    more = retransmits(
        *({**ENDS, "cause": each, "daddr": "10.200.100.100", "sk_cookie": 7, "segs": 8} for each in causes)
    )
    summary.add(in_order([decoded(RETRANSMITS, more)]))
    shown = summary.text(80, as_json=False).splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[2].split()[4:] == ["fast=16", "rto=8", "slow~", "10.200.100.100:51234"], "the most frequent first"
    narrowest = summary.text(60, as_json=False).splitlines()
    assert max(map(len, narrowest)) <= 60
    assert narrowest[1].split() == ["RETRANS", "LIMIT", "CAUSES", "FLOW"]
    assert "not counted" not in narrowest[0]
    monkeypatch.setattr("producer.commands.trace._MAX_FLOWS", 3)
    summary.add(in_order([decoded(RETRANSMITS, retransmits({**ENDS, "cause": "rto", "sk_cookie": 8}))]))
    assert summary.text(80, as_json=False).splitlines()[0].endswith(" errors; further flows are not counted")
