"""docs/worst_peers.ipynb runs on an export, in a kernel of its own, and names the peer that loses."""

import json
import os
import subprocess
import sys
from pathlib import Path

from producer.commands.export import export
from producer.consume.period import Period
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.export.sources import Files
from tests.support.analysis import write_scene

NOTEBOOK = Path(__file__).resolve().parents[3] / "docs" / "worst_peers.ipynb"
RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_the_notebook_names_the_peer_that_loses(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in")
    export(Files([scene]), tmp_path / "events", "parquet", Period(), frozenset({FLOWS, RETRANSMITS, TRANSMITS}))
    done = tmp_path / "done.ipynb"
    environment = {**os.environ, "REBPF_EXPORT": str(tmp_path / "events"), "MPLBACKEND": "agg"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, NOTEBOOK, done], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    cells = json.loads(done.read_text())["cells"]
    texts = ["".join("".join(output.get("text", "")) for output in cell.get("outputs", [])) for cell in cells]
    (worst,) = [text for text in texts if "failed_connects" in text]
    first, *_, refused = [line.split("│")[1:-1] for line in worst.splitlines() if "10." in line]
    assert [cell.strip() for cell in first[:7]] == ["10.0.0.7", "150", "3000", "5.0", "30", "120", "0"]
    assert worst.index("10.0.0.7") < worst.index("10.9.9.9")
    assert refused


def test_the_notebook_is_stored_without_results() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []
