"""Files of records: what is written is read, here and by fastavro; damaged and foreign files are one kind of error."""

import io
from pathlib import Path

import fastavro
import pytest

from producer.errors import IncompleteError, OutputError, UnavailableError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.view.file import RecordFile, read
from tests.support.hostile_files import HOSTILE
from tests.support.views import decoded, flows, retransmits, transmits

BATCHES = [
    decoded(RETRANSMITS, retransmits({"cause": "rto", "seq": 7}, {"cause": "tlp", "saddr": "10.0.0.1"})),
    decoded(FLOWS, flows({"comm": "curl", "reason": "close", "error": 111})),
    decoded(TRANSMITS, transmits({"is_retransmit": 1}, {"unknown": (1 << 20) - 1})),
]


def write(path: Path) -> None:
    file = RecordFile(path)
    for records in BATCHES:
        file.write(records)
    file.close()


def test_a_file_has_the_records_that_were_written(tmp_path: Path) -> None:
    write(tmp_path / "file")
    found = [*read(tmp_path / "file")]
    assert [each.stream for each in found] == [RETRANSMITS, FLOWS, TRANSMITS]
    assert [[*each.rows()] for each in found] == [[*each.rows()] for each in BATCHES]


def test_fastavro_reads_a_file(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        records = [*fastavro.reader(file)]
    assert [record.get("cause") for record in records] == ["rto", "tlp", None, None, None]
    assert records[2]["error"] == "ECONNREFUSED"


def test_a_container_of_one_stream_is_read(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        reader = fastavro.reader(file)
        schema = reader.writer_schema[1]
        first = next(reader)
    with (tmp_path / "one").open("wb") as file:
        fastavro.writer(file, schema, [first])
    [records] = read(tmp_path / "one")
    assert records.stream == RETRANSMITS
    assert len(records) == 1


def test_a_full_disk_is_an_error_of_the_output() -> None:
    with pytest.raises(OutputError, match="/dev/full: No space left on device"):
        write(Path("/dev/full"))


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="No such file"):
        [*read(tmp_path / "missing")]


@pytest.mark.parametrize("content", [b"", b"text", b"Obj\x01", b"Obj\x01\x04"])
def test_another_file_is_incomplete(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(IncompleteError, match="expected an Avro file"):
        [*read(tmp_path / "file")]


def test_a_foreign_container_is_incomplete(tmp_path: Path) -> None:
    schema = {"type": "record", "name": "Other", "fields": [{"name": "ts_ns", "type": "long"}]}
    buffer = io.BytesIO()
    fastavro.writer(buffer, schema, [{"ts_ns": 1}])
    (tmp_path / "file").write_bytes(buffer.getvalue())
    with pytest.raises(IncompleteError, match="expected an Avro file"):
        [*read(tmp_path / "file")]


@pytest.mark.parametrize("left", range(1, 170, 7))  # within the last block
def test_a_cut_file_is_incomplete(tmp_path: Path, left: int) -> None:
    write(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-left])
    with pytest.raises(IncompleteError):
        [*read(tmp_path / "file")]


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_schema_of_others_is_refused_before_it_unfolds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(IncompleteError, match=r"expected an Avro file of `rebpf trace -w`: it (is not|has)"):
        [*read(tmp_path / "file")]


def test_two_files_in_one_are_incomplete(tmp_path: Path) -> None:
    write(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes() * 2)
    with pytest.raises(IncompleteError, match="expected an Avro file"):
        [*read(tmp_path / "file")]
