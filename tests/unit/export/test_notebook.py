"""docs/worst_peers.ipynb runs on an export, in a kernel of its own, and names the peer that loses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from producer.commands.export import export
from producer.consume.period import Period
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.export.sources import Files
from tests.support.analysis import NOON_NS, SECOND_NS, record, write_container, write_scene

NOTEBOOK = Path(__file__).resolve().parents[3] / "docs" / "worst_peers.ipynb"
RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def worst_peers(source: Path, folder: Path) -> dict[str, list[str]]:
    """Run the notebook on an export of a folder; return the lines of its table by peer, in order."""
    export(Files([source]), folder / "events", "parquet", Period(), frozenset({FLOWS, RETRANSMITS, TRANSMITS}))
    done = folder / "done.ipynb"
    environment = {**os.environ, "REBPF_EXPORT": str(folder / "events"), "MPLBACKEND": "agg"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, NOTEBOOK, done], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    cells = json.loads(done.read_text())["cells"]
    texts = ["".join("".join(output.get("text", "")) for output in cell.get("outputs", [])) for cell in cells]
    (worst,) = [text for text in texts if "failed_connects" in text]
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in worst.splitlines() if "10." in line]
    return {peer: cells for peer, *cells in lines}


@pytest.mark.slow
def test_the_notebook_names_the_peer_that_loses(tmp_path: Path) -> None:
    worst = worst_peers(write_scene(tmp_path / "in"), tmp_path)
    assert worst["10.0.0.7"][:6] == ["150", "3000", "5.0", "30", "120", "0"]
    assert [*worst][:2] == ["10.0.0.7", "10.9.9.9"]


@pytest.mark.slow
def test_causes_count_from_0_again_after_a_restart_of_the_producer(tmp_path: Path) -> None:
    def flow(at: int, sent: int, total: int, rto: int, **fields: Any) -> dict[str, Any]:
        counters = {"segs_out": sent, "total_retrans": total, "retrans_rto": rto, "retrans_fast": 0, "retrans_tlp": 0}
        made = record(FLOWS, host="web-1", boot_id="boot", state="ESTABLISHED", reason="interval", srtt_us=1000)
        return {**made, **counters, "ts_ns": NOON_NS + at * SECOND_NS, **fields}

    new = {"daddr": "10.0.0.1", "sk_cookie": 1, "role": "server"}
    records = [
        flow(10, 100, 10, 10, **new, start_ns=NOON_NS + SECOND_NS),
        flow(20, 150, 15, 4, **new, start_ns=None),  # one of the five came between the two producers
        flow(30, 200, 20, 9, **new, start_ns=None),
        flow(30, 200, 20, 9, **new, start_ns=None),
        flow(0, 1000, 100, 7, daddr="10.0.0.2", sk_cookie=2, start_ns=None),
        flow(40, 1010, 101, 8, daddr="10.0.0.2", sk_cookie=2, start_ns=None, reason="close"),
    ]
    write_container(tmp_path / "in" / "flows.avro", FLOWS, records)
    worst = worst_peers(tmp_path / "in", tmp_path)
    assert worst["10.0.0.1"][:4] == ["20", "201", "9.95", "19"], "with its SYN-ACK"
    assert worst["10.0.0.2"][:4] == ["1", "10", "10.0", "1"]


def test_the_notebook_is_stored_without_results() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []


def test_the_notebook_finds_the_export_from_its_own_folder() -> None:
    """Jupyter runs a notebook in the notebook's folder."""
    (path,) = re.findall(r"REBPF_EXPORT=(\S+)", "".join(json.loads(NOTEBOOK.read_text())["cells"][0]["source"]))
    assert path == "$PWD/events"
