"""Finds the file and the line of a setting, for messages that begin with its path: `rules[2].port: ...`.

tomllib does not keep positions. This reads headers and keys only, which is enough to point a user to the line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Possessive (++), so that the time is linear in a line's length.
_HEADER = re.compile(r"\s*+(\[{1,2})([^\[\]]++)\]{1,2}\s*+(?:#.*)?")
_KEY = re.compile(r"([\w\"'.\s-]++)=")
_PATH = re.compile(r"(?:unknown key )?([\w.\[\]-]{1,1000})")
_RULE = re.compile(r"rule (\d+)\b")
_ITEM = re.compile(r"([\w.-]+)\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the configuration. Later files replace the values of earlier ones."""

    path: Path
    text: str
    lists: Mapping[str, range]
    """Which items of each list of tables the file has, counted from 0 over all files."""


def find(sources: Sequence[Source], message: str) -> tuple[Source, int] | None:
    """Return the file and line of the setting that the message begins with, or of the table that encloses it.

    None if there is no such line.
    """
    rule = _RULE.match(message)
    path = f"rules[{rule[1]}]" if rule else found[1] if (found := _PATH.match(message)) else ""
    if item := _ITEM.match(path):
        sources = [each for each in sources if int(item[2]) - 1 in each.lists.get(item[1], range(0))]
    located = [(each, key, number) for each in reversed(sources) for key, number in locations(each)]
    while path:
        for source, key, number in located:
            if key == path or key.startswith((f"{path}.", f"{path}[")):
                return source, number
        path = path.rpartition(".")[0] or path.partition("[")[0] * path.endswith("]")
    return None


def locations(source: Source) -> list[tuple[str, int]]:
    """Return the path and line of each header and key."""
    table, found = "", []
    counts = {name: items.start for name, items in source.lists.items()}
    for number, each in enumerate(source.text.split("\n"), 1):
        if header := _HEADER.fullmatch(each):
            table = _plain(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, 0) + 1
                table += f"[{counts[table]}]"
            found.append((table, number))
        elif key := _KEY.match(each):
            found.append((f"{table}.{_plain(key[1])}".lstrip("."), number))
    return found


def _plain(path: str) -> str:
    return re.sub(r"[\s\"']", "", path)
