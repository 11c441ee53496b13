"""The wheel, built from the source distribution, is complete: installed alone in a clean venv, it runs from another
folder on the files that it carries."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


_WHERE = "import producer.paths as p; print(p.BPF); print(p.SCHEMAS)"


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation, which would download the build system twice.
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("rebpf-*.whl")
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    _run(folder / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    return folder / "venv"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_runs_from_another_folder(venv: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in _run(venv / "bin/rebpf", "version", cwd=tmp_path)


def test_the_native_module_is_in_the_wheel(venv: Path, tmp_path: Path) -> None:
    where = _run(venv / "bin/python", "-c", "import producer._native as n; print(n.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(venv)
    assert Path(where.strip()).name == "_native.abi3.so"


def test_bpf_sources_and_schemas_are_in_the_wheel(venv: Path, tmp_path: Path) -> None:
    bpf, schemas = map(Path, _run(venv / "bin/python", "-c", _WHERE, cwd=tmp_path).split())
    assert bpf.is_relative_to(venv)
    assert schemas.is_relative_to(venv)
    assert _files(bpf) == _files(ROOT / "bpf")
    assert _files(schemas) == _files(ROOT / "schemas")
