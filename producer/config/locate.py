"""Finds the line of a setting in a TOML file, for messages that begin with its path: `rules[2].port: ...`.

tomllib does not keep positions. This reads headers and keys only, which is enough to point a user to the line.
"""

import re
from collections import Counter

_HEADER = re.compile(r"\s*(\[{1,2})\s*([^\[\]]+?)\s*\]{1,2}\s*(?:#.*)?")
_KEY = re.compile(r"\s*([\w\"'. -]+?)\s*=")
_PATH = re.compile(r"(?:unknown key )?([\w.\[\]-]+)")
_RULE = re.compile(r"rule (\d+)\b")


def line(text: str, message: str) -> str:
    """Return `line N: ` for the setting that the message begins with, or for the table that encloses it."""
    rule = _RULE.match(message)
    path = f"rules[{rule[1]}]" if rule else found[1] if (found := _PATH.match(message)) else ""
    locations = _locations(text)
    while path:
        for key, number in locations:
            if key == path or key.startswith((f"{path}.", f"{path}[")):
                return f"line {number}: "
        path = path.rpartition(".")[0]
    return ""


def _locations(text: str) -> list[tuple[str, int]]:
    """Return the path and line of each header and key."""
    table, found = "", []
    counts: Counter[str] = Counter()
    for number, each in enumerate(text.split("\n"), 1):
        if header := _HEADER.fullmatch(each):
            table = _plain(header[2])
            if header[1] == "[[":
                counts[table] += 1
                table += f"[{counts[table]}]"
            found.append((table, number))
        elif key := _KEY.match(each):
            found.append((f"{table}.{_plain(key[1])}".lstrip("."), number))
    return found


def _plain(path: str) -> str:
    return re.sub(r"[\s\"']", "", path)
