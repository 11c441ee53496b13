"""Files of records: what is written is read, here and by fastavro; a damaged file is an error."""

from collections.abc import Iterator
from pathlib import Path

import fastavro
import pytest

from producer.errors import IncompleteError, OutputError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.export.container import read_container
from producer.view.file import RecordFile
from producer.view.records import Records, in_order, of_table
from tests.support.views import decoded, flows, retransmits, transmits

BATCHES = [
    decoded(RETRANSMITS, retransmits({"cause": "rto", "seq": 7}, {"cause": "tlp", "saddr": "10.0.0.1"})),
    decoded(FLOWS, flows({"comm": "curl", "reason": "close", "error": 111})),
    decoded(TRANSMITS, transmits({"is_retransmit": 1}, {"unknown": (1 << 20) - 1})),
]


def write(path: Path) -> None:
    file = RecordFile(path)
    for records in BATCHES:
        file.write(in_order([records]))
    file.close()


def read(path: Path) -> Iterator[Records]:
    return (of_table(part.stream, part.table) for part in read_container(path, {}, in_order=True))


def test_a_file_has_the_records_that_were_written_in_their_order(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "file")
    for records in [*BATCHES, *BATCHES]:
        file.write(in_order([records]))
    file.close()
    found = [*read(tmp_path / "file")]
    assert [each.stream for each in found] == [RETRANSMITS, FLOWS, TRANSMITS] * 2
    assert [[*each.rows()] for each in found] == [[*each.rows()] for each in BATCHES] * 2


def test_fastavro_reads_a_file(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        records = [*fastavro.reader(file)]
    assert [record.get("cause") for record in records] == ["rto", "tlp", None, None, None]
    assert records[2]["error"] == "ECONNREFUSED"


def test_a_full_disk_is_an_error_of_the_output() -> None:
    with pytest.raises(OutputError, match="/dev/full: No space left on device"):
        write(Path("/dev/full"))


@pytest.mark.parametrize("left", range(1, 170, 7))  # within the last block
def test_a_cut_file_is_incomplete(tmp_path: Path, left: int) -> None:
    write(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-left])
    with pytest.raises(IncompleteError):
        [*read(tmp_path / "file")]


def test_two_files_in_one_are_incomplete(tmp_path: Path) -> None:
    write(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes() * 2)
    with pytest.raises(IncompleteError, match="damaged"):
        [*read(tmp_path / "file")]
