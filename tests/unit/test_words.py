"""Words that were replaced do not come back: not in the help, the messages, the comments or the documents."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RETIRED = (
    "mend",
    "mends",
    "mended",
    "rung",
    "rungs",
    "twin",
    "twins",
    "likewise",
    "sent again",
    "sends again",
    "what waits",
    "who takes over",
    "is told",
    "are told",
    "not to be had",
    "is wanted",
    "are wanted",
    "so many",
    "put by",
    "how-manieth",
    "once more",
    "embedded broker",
    "without a word",
)
PATTERN = re.compile(rf"\b({'|'.join(RETIRED)})\b", re.IGNORECASE)
SUFFIXES = {"", ".py", ".c", ".h", ".md", ".yml", ".toml", ".sql", ".service", ".conf", ".avsc", ".json"}


def files() -> Iterator[Path]:
    """Yield what people read, except this list, licenses, and the schemas of releases, which never change."""
    for folder in ("producer", "bpf", "schemas", "deploy", "docs", "tests", "scripts"):
        for path in sorted((ROOT / folder).rglob("*")):
            is_ours = path.name != "LICENSE" and "released" not in path.parts and path != Path(__file__)
            if path.is_file() and path.suffix in SUFFIXES and is_ours:
                yield path
    yield ROOT / "README.md"


@pytest.mark.parametrize("folder", ["producer", "bpf", "schemas", "deploy", "docs", "tests", "scripts", "README.md"])
def test_retired_words_do_not_come_back(folder: str) -> None:
    read = [path for path in files() if path.relative_to(ROOT).parts[0] == folder]
    assert read
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in read
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := PATTERN.search(line))
    ]
    assert found == []
