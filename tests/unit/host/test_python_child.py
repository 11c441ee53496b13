import subprocess
import sys
from pathlib import Path

import pytest

from producer.host.python_child import python


def test_the_child_finds_modules_where_this_process_does_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "told.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path)")
    (tmp_path / "told.py").write_text("print('another')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "ours"), *sys.path])
    done = subprocess.run(python("told", "a b", "'"), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"__main__ ['a b', \"'\"] {sys.path}\n"
