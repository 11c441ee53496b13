"""Files of records: what is written is read, here and by fastavro; a damaged file is an error."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fastavro
import pytest

from producer.errors import IncompleteError, OutputError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.export.container import read_container
from producer.view.file import RecordFile
from producer.view.records import Records, in_order
from tests.support.rebpf import DEADLINE_S, command
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
    return (Records.from_table(part.stream, part.table) for part in read_container(path, {}, in_order=True))


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


STOPPED = """
import sys
from pathlib import Path
from producer.host.signals import stop_on_signals
from producer.view.file import RecordFile
stop = stop_on_signals()
print("ready", flush=True)
while True:
    RecordFile(Path(sys.argv[1]))
"""


def test_a_stop_ends_the_wait_for_a_reader_that_does_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", STOPPED, str(tmp_path / "pipe")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.terminate()
        assert b"pipe: the reader does not read\n" in child.communicate(timeout=DEADLINE_S)[1]
    finally:
        os.close(reader)


@pytest.mark.parametrize("option", ["-r", "-w"])
def test_a_signal_ends_the_wait_for_the_other_end_of_a_pipe(tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    child = subprocess.Popen(command("trace", option, tmp_path / "pipe"), stdout=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + DEADLINE_S
        while "fifo" not in (wait := Path(f"/proc/{child.pid}/wchan").read_text()) and "partner" not in wait:
            assert time.monotonic() < until_s
            assert child.poll() is None
            time.sleep(0.01)
        child.terminate()
        assert child.wait(timeout=DEADLINE_S) == -signal.SIGTERM
    finally:
        child.kill()
