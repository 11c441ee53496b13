"""Modules and files that texts name exist, also in the code of child processes; test modules import no test modules."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import ROOT

FOLDERS = (".ci", "bpf", "deploy", "docs", "producer", "scripts", "tests")
FILES = ("README.md", "pyproject.toml", "docker-compose.yml")
SUFFIXES = {"", ".py", ".go", ".c", ".h", ".md", ".toml", ".yml", ".sql"}
_NAME = r"\w+(?: as \w+)?"
_IMPORT = re.compile(rf"\bfrom ((?:tests|producer)(?:\.\w+)*) import (?:\(([^)]*)\)|({_NAME}(?:, {_NAME})*))")
"""An import, which may be inside a string."""
_MODULE = re.compile(r"(?<![\w./-])((?:tests(?=\.[a-z])(?!\.lock\b)|(?<=-m )producer|(?<=import )producer)(?:\.\w+)*)")
_PATH = re.compile(r"(?<![\w./-])tests/[\w./*-]*\w")


def texts() -> Iterator[tuple[Path, str]]:
    """Yield the files in which modules and paths are named, with their text."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    for path in sorted([*paths, *(ROOT / name for name in FILES)]):
        if path.is_file() and path.suffix in SUFFIXES:
            yield path.relative_to(ROOT), path.read_text(errors="replace")


@functools.cache
def names(module: str) -> frozenset[str] | None:
    """Return the names that a module defines or imports, with its submodules; None if it does not exist."""
    folder = ROOT.joinpath(*module.split("."))
    sources = [folder / "__init__.py", folder.with_suffix(".py"), folder.with_suffix(".pyi")]
    source = next((path for path in sources if path.exists()), None)
    if source is None:
        return None
    found = {path.stem for path in folder.glob("*") if path.suffix in (".py", ".pyi") or path.is_dir()}
    for statement in ast.parse(source.read_text()).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).partition(".")[0])
    return frozenset(found)


def exists(dotted: str) -> bool:
    """Whether this is a module, or a name in one with attributes of its own."""
    module, _, name = dotted.rpartition(".")
    while names(dotted) is None and module and names(module) is None:
        module, _, name = module.rpartition(".")
    return names(dotted) is not None or name in (names(module) or ())


def imported() -> Iterator[tuple[Path, str]]:
    """Yield each name that is imported, with its module, and the file."""
    for path, text in texts():
        for match in _IMPORT.finditer(text):
            for name in (match[2] or match[3]).split(","):
                if name.strip():
                    yield path, f"{match[1]}.{name.split()[0]}"


@pytest.mark.slow
def test_imported_names_exist_also_in_strings() -> None:
    found = list(imported())
    assert len(found) > 1000
    assert [(str(path), name) for path, name in found if not exists(name)] == []


def test_modules_that_are_named_exist() -> None:
    found = [(str(path), name) for path, text in texts() for name in _MODULE.findall(text)]
    assert len(found) > 300
    assert [(path, name) for path, name in found if not exists(name)] == []


def test_paths_of_tests_that_are_named_exist() -> None:
    found = [(str(path), name) for path, text in texts() for name in _PATH.findall(text)]
    assert len(found) > 25
    assert [(path, name) for path, name in found if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("folder", ["tests", "tests/support"])
def test_no_module_imports_tests(folder: str) -> None:
    """Test modules import helpers alone, and the helpers import nothing of the tests' folders."""
    allowed = ("tests.support",) if folder == "tests/support" else ("tests",)
    found = [(path, name) for path, name in imported() if path.is_relative_to(folder) and name.startswith("tests.")]
    assert found
    wrong = [
        (str(path), name)
        for path, name in found
        if not name.startswith(allowed) or any(part.startswith("test_") for part in name.split("."))
    ]
    assert wrong == []
