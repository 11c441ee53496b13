"""Export and `rebpf.read`: every source gives the same events, and files appear complete or not at all."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

import rebpf
from producer.commands.export import export
from producer.consume.period import Period
from producer.errors import IncompleteError, UnavailableError, UsageError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Stream
from producer.export import dataset
from producer.export.sources import Files
from producer.view.file import RecordFile
from producer.view.records import Records
from tests.support.analysis import DAY_NS, NOON_NS, record, write_container, write_spool
from tests.support.disks import files_of_at_most, fill, small_disk
from tests.support.hostile_files import HOSTILE

ALL = frozenset({TRANSMITS, RETRANSMITS, FLOWS})
STRANGE = 'a"b,\n\u202e\x7f=1+1 $\\x'


def events(stream: Stream, count: int = 50) -> list[dict[str, Any]]:
    """Return events with nulls, strange texts and any numbers; the last one is a day later."""
    return [
        record(
            stream,
            ts_ns=NOON_NS + at + DAY_NS * (at == count - 1),
            cpu_seq=at + 1,
            host=STRANGE if at % 3 else "web-1",
            unit=None if at % 2 else f"unit-{at}.service",
            sk_cookie=(1 << 63) - 1 if at % 2 else None,
            srtt_us=at,
            labels={"env": STRANGE, "dc": "a"} if at % 4 else {},
        )
        for at in range(count)
    ]


def rows(table: Any) -> list[dict[str, Any]]:
    """Return a table's rows as records, ordered, with the time in milliseconds again."""
    made = table.set_column(0, "ts", table["ts"].cast(pa.int64())).to_pylist(maps_as_pydicts="strict")
    return sorted(made, key=lambda each: each["cpu_seq"])


@pytest.mark.parametrize("stream", [TRANSMITS, RETRANSMITS, FLOWS], ids=lambda stream: stream.name)
@pytest.mark.parametrize("codec", ["null", "deflate", "zstandard", "spool"])
def test_files_give_every_field_of_every_event(tmp_path: Path, stream: Stream, codec: str) -> None:
    given = events(stream)
    if codec == "spool":
        path = write_spool(tmp_path / "spool", stream, given)
    else:
        path = write_container(tmp_path / "events.avro", stream, given, codec)
    assert rows(rebpf.read(path, topic=stream.topic)) == given


def test_a_trace_of_several_streams_gives_the_events_of_each(tmp_path: Path) -> None:
    path, given = tmp_path / "trace.avro", {stream: events(stream) for stream in (RETRANSMITS, FLOWS, TRANSMITS)}
    file = RecordFile(path)
    for stream, records in given.items():
        file.write((stream, record) for record in records)
    file.close()
    for stream, records in given.items():
        assert rows(rebpf.read(path, topic=stream.topic)) == records


@pytest.mark.parametrize("stream", [TRANSMITS, RETRANSMITS, FLOWS], ids=lambda stream: stream.name)
def test_an_export_is_read_as_the_file_that_it_was_made_of(tmp_path: Path, stream: Stream) -> None:
    given = events(stream)
    original = Files([write_container(tmp_path / "in.avro", stream, given)])
    export(original, tmp_path / "out", "parquet", Period(), ALL)
    parts = [*Files([tmp_path / "out"]).parts({})]
    assert {part.stream for part in parts} == {stream}
    found = [row for part in parts for row in Records.from_table(stream, part.table).rows()]
    assert found == given
    export(Files([tmp_path / "out"]), tmp_path / "again", "parquet", Period(), ALL)
    assert rows(rebpf.read(tmp_path / "again", topic=stream.topic)) == given


@pytest.mark.slow
def test_many_days_keep_few_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_MOST_ROWS", 100)
    given = [{**each, "ts_ns": NOON_NS + at % 30 * DAY_NS} for at, each in enumerate(events(FLOWS, 900))]
    given = [{**each, "ts": each["ts_ns"] // 1_000_000} for each in given]
    paths = [write_container(tmp_path / f"{at}.avro", FLOWS, given[at : at + 300]) for at in range(0, 900, 300)]
    written = export(Files(paths), tmp_path, "parquet", Period(), ALL)
    assert set(written.values()) == {30}
    groups = [pyarrow.parquet.ParquetFile(path).num_row_groups for path in written]
    assert sum(groups) > len(written), "some were written before the end"
    assert rows(rebpf.read(*written, topic="tcp_flow")) == given


def test_parquet_of_another_version_or_tool_is_read(tmp_path: Path) -> None:
    """Without a field that is newer, and with the types that the tool likes."""
    path = write_container(tmp_path / "in.avro", FLOWS, events(FLOWS))
    (written,) = export(Files([path]), tmp_path / "out", "parquet", Period(NOON_NS, NOON_NS + 9), ALL)
    other = tmp_path / "other.parquet"
    plain = "select * exclude (labels, pid) replace (sport::bigint as sport)"
    duckdb.sql(f"copy ({plain} from '{written}' order by cpu_seq) to '{other}' (format parquet)")
    table = rebpf.read(other, topic="tcp_flow")
    assert rows(table) == [{**each, "labels": None, "pid": None} for each in events(FLOWS)[:9]]


def test_all_sources_that_are_given_are_read(tmp_path: Path) -> None:
    path = write_container(tmp_path / "in.avro", FLOWS, events(FLOWS))
    export(Files([path]), tmp_path / "out", "parquet", Period(), ALL)
    assert len(rebpf.read(tmp_path / "out", path, topic="tcp_flow")) == 2 * len(events(FLOWS))


def test_parquet_of_other_events_and_damaged_parquet_are_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    pyarrow.parquet.write_table(pa.table({"cause": [1.5], "ts_ns": ["now"]}), tmp_path / "types.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 damaged PAR1")
    for name, kind, message in (
        ("other", UnavailableError, "has no events of ReBPF"),
        ("types", IncompleteError, "damaged, or not Parquet with the types of our events"),
        ("damaged", IncompleteError, "damaged"),
        ("missing", UnavailableError, "No such file"),
    ):
        with pytest.raises(kind, match=rf"{name}\.parquet: {message}"):
            rebpf.read(tmp_path / f"{name}.parquet", topic="tcp_retransmit")


def test_parquet_and_csv_are_partitioned_by_day_and_have_the_same_events(tmp_path: Path) -> None:
    given = events(FLOWS)
    source = Files([write_container(tmp_path / "in.avro", FLOWS, given)])
    for form in ("parquet", "csv"):
        written = export(source, tmp_path / form, form, Period(), ALL)
        days = tmp_path / form / "tcp_flow"
        assert dict(written) == {
            days / "date=2026-09-21" / f"begin-end.{form}": 49,
            days / "date=2026-09-22" / f"begin-end.{form}": 1,
        }
    assert rows(rebpf.read(tmp_path / "parquet", topic="tcp_flow")) == given
    first = pyarrow.csv.read_csv(
        tmp_path / "csv/tcp_flow/date=2026-09-21/begin-end.csv",
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
    )
    assert first["host"].to_pylist() == [each["host"] for each in given[:-1]]
    assert first["srtt_us"].to_pylist() == [each["srtt_us"] for each in given[:-1]]
    assert first["ts"].cast(pa.timestamp("ms", "UTC")).cast(pa.int64()).to_pylist() == [
        each["ts"] for each in given[:-1]
    ]
    assert [json.loads(each) for each in first["labels"].to_pylist()] == [each["labels"] for each in given[:-1]]
    files = str(tmp_path / "parquet/tcp_flow/**/*.parquet")
    counted = duckdb.sql(f"select cast(date as varchar), count(*) from read_parquet('{files}') group by 1 order by 1")
    by_label = duckdb.sql(f"select labels['dc'], count(*) from read_parquet('{files}') group by 1 order by 2")
    assert by_label.fetchall() == [(None, 13), ("a", 37)]
    assert counted.fetchall() == [("2026-09-21", 49), ("2026-09-22", 1)]


def test_a_repeated_export_replaces_its_files_and_another_period_adds_some(tmp_path: Path) -> None:
    source = Files([write_container(tmp_path / "in.avro", FLOWS, events(FLOWS))])
    early, late = Period(None, NOON_NS + 10), Period(NOON_NS + 10, NOON_NS + DAY_NS)
    for period in (early, early, late):
        export(source, tmp_path / "out", "parquet", period, ALL)
    read = rows(rebpf.read(tmp_path / "out", topic="tcp_flow"))
    assert [each["cpu_seq"] for each in read] == list(range(1, 51))[:49]


def test_a_period_and_columns_are_chosen(tmp_path: Path) -> None:
    path = write_container(tmp_path / "in.avro", RETRANSMITS, events(RETRANSMITS))
    table = rebpf.read(path, topic="tcp_retransmit", since="2026-09-22", columns=["cpu_seq", "host"])
    assert table.to_pylist() == [{"cpu_seq": 50, "host": STRANGE}]
    export(Files([path]), tmp_path / "out", "parquet", Period(), ALL)
    again = rebpf.read(tmp_path / "out", topic="tcp_retransmit", since="2026-09-22", columns=["cpu_seq", "host"])
    assert again.to_pylist() == table.to_pylist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"topic": "tcp_flows"}, "topic: expected one of tcp_transmit, tcp_retransmit, tcp_flow, found 'tcp_flows'"),
        ({"topic": "tcp_flow", "columns": ["cause"]}, "tcp_flow has no column cause"),
        ({"topic": "tcp_flow", "since": "yesterday"}, "expected a time in UTC such as .* found 'yesterday'"),
        ({"topic": "tcp_flow", "brokers": "localhost:9092"}, "give either files or brokers"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    path = write_container(tmp_path / "in.avro", FLOWS, events(FLOWS))
    with pytest.raises(UsageError, match=message):
        rebpf.read(path, **wrong)


def test_files_of_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.avro").write_text("no Avro")
    with pytest.raises(UnavailableError, match=r"text.avro: not an Avro object container file"):
        rebpf.read(tmp_path, topic="tcp_flow")
    with pytest.raises(UnavailableError, match=r"missing.avro: No such file"):
        rebpf.read(tmp_path / "missing.avro", topic="tcp_flow")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnavailableError, match=r"no .avro or .parquet files"):
        rebpf.read(tmp_path / "empty", topic="tcp_flow")


@pytest.mark.parametrize("codec", ["null", "spool"])
def test_damage_is_an_error_and_leaves_no_file(tmp_path: Path, codec: str) -> None:
    if codec == "spool":
        (path,) = write_spool(tmp_path / "in", FLOWS, events(FLOWS)).iterdir()
    else:
        path = write_container(tmp_path / "in.avro", FLOWS, events(FLOWS), codec)
    content = bytearray(path.read_bytes())
    content[-40 if codec == "spool" else -1500] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(IncompleteError, match="damaged"):
        export(Files([path]), tmp_path / "out", "parquet", Period(), ALL)
    assert [each for each in tmp_path.rglob("*.partial") if each.is_file()] == []
    assert list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.root
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path: Path, form: str) -> None:
    source = Files([write_container(tmp_path / "in.avro", FLOWS, events(FLOWS, 5000))])
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(UnavailableError, match=r"cannot write to .*disk: No space left on device"):
            export(source, disk, form, Period(), ALL)
        assert [each.name for each in disk.rglob("*") if each.is_file()] == ["filler"]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_disk_that_is_full_when_files_are_finished_leaves_none(tmp_path: Path, form: str) -> None:
    streams = {stream: tmp_path / f"{stream.name}.avro" for stream in (FLOWS, RETRANSMITS)}
    source = Files([write_container(path, stream, events(stream, 5)) for stream, path in streams.items()])
    with files_of_at_most(100), pytest.raises(UnavailableError, match=r"cannot write to .*out: File too large"):
        export(source, tmp_path / "out", form, Period(), ALL)
    gc.collect()
    assert not [each for each in (tmp_path / "out").rglob("*") if each.is_file()]


def test_a_signal_just_after_a_file_was_created_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Files([write_container(tmp_path / "in.avro", FLOWS, events(FLOWS))])

    def interrupted(partial: Path) -> None:
        partial.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", "parquet", Period(), ALL)
    assert [each for each in (tmp_path / "out").rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_schema_of_others_is_refused_before_it_unfolds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.avro").write_bytes(content)
    with pytest.raises(UnavailableError, match=r"file\.avro: has no events of ReBPF"):
        rebpf.read(tmp_path, topic="tcp_flow")


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_links_that_another_user_has_put_in_place_of_partial_files_are_not_followed(tmp_path: Path, form: str) -> None:
    source = Files([write_container(tmp_path / "in.avro", FLOWS, events(FLOWS))])
    written = sorted(export(source, tmp_path / "out", form, Period(), ALL))
    expected = [path.read_bytes() for path in written]
    for number, path in enumerate(written):
        path.unlink()
        path.with_name(f".{path.name}.{os.getpid()}.partial").symlink_to(tmp_path / f"theirs{number}")
    (tmp_path / "theirs0").write_bytes(b"theirs")
    assert sorted(export(source, tmp_path / "out", form, Period(), ALL)) == written
    assert (tmp_path / "theirs0").read_bytes() == b"theirs"
    assert not (tmp_path / "theirs1").exists()
    assert [path.read_bytes() for path in written] == expected
    assert not any(map(Path.is_symlink, written))
