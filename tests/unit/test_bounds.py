"""docs/truth.md lists each map of the programs, and docs/architecture.md each table of the producer, with its bound."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPS = (ROOT / "docs" / "truth.md").read_text().split("## Tables and their bounds")[1].split("\n## ")[0]
TABLES = (ROOT / "docs" / "architecture.md").read_text().split("## Bounds")[1].split("\n## ")[0]
_DECLARATION = re.compile(r"^BPF_(\w+)\(([^;]*)\);", re.MULTILINE)
_NAME = {"TABLE": 3, "RINGBUF_OUTPUT": 0}
"""The index of the argument with the name; 0 for macros that are not listed."""


def declared() -> Iterator[tuple[str, str]]:
    """Yield each map's name and size from the source."""
    for path in sorted((ROOT / "bpf").glob("*.[ch]")):
        for macro, arguments in _DECLARATION.findall(path.read_text()):
            values = [value.strip() for value in arguments.split(",")]
            yield values[_NAME.get(macro, 0)], values[-1]


def rows(table: str) -> Iterator[tuple[str, str]]:
    """Yield each row's first two cells."""
    for line in table.splitlines():
        if line.startswith("| ") and not line.startswith("|---"):
            yield tuple(cell.strip() for cell in line.split("|")[1:3])  # type: ignore[misc]


def evaluated(size: str) -> int:
    """Return a size in C as a number; the constants are those of rules.h."""
    constants = dict(re.findall(r"^#define (\w+) (\d+)", (ROOT / "bpf" / "rules.h").read_text(), re.MULTILINE))
    expression = re.sub(r"[A-Z_]+", lambda word: constants[word[0]], size)
    assert re.fullmatch(r"[\d\s()*+/]+", expression)
    return int(eval(expression.replace("/", "//")))  # only digits and operators


def documented() -> dict[str, str]:
    return {name: bound for names, bound in rows(MAPS) for name in re.findall(r"`(\w+)`", names)}


def test_each_map_is_in_the_table_and_nothing_else() -> None:
    names = [name for name, _ in declared()]
    assert len(names) > 10
    assert set(documented()) == set(names)


def test_each_map_has_the_bound_that_the_table_says() -> None:
    for name, size in declared():
        if name.endswith("_pipe"):
            continue  # sized by the settings
        if size.startswith("struct "):
            assert documented()[name].split(", or ")[0] == "one for each socket", "socket storage has no size"
            continue
        bound = documented()[name].split(", or ")[-1].split(" before ")[0]
        bound = bound.split(",", 1)[0] if "per CPU" in bound else bound
        factors = [int(factor) for factor in bound.replace(",", "").split("*")]
        expected = factors[0] * (factors[1] if len(factors) > 1 else 1)
        assert expected == evaluated(size), name


@pytest.mark.parametrize(
    ("constant", "bound"),
    [(name, bound) for names, bound in rows(TABLES) for name in re.findall(r"`(producer\.[\w.]+)`", names)],
)
def test_each_table_of_the_producer_has_the_bound_that_the_document_says(constant: str, bound: str) -> None:
    module, name = constant.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) == int(bound.replace(",", ""))
