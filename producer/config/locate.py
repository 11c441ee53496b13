"""Where in a TOML file a setting stands, for messages that begin with its path: `rules[2].port: ...`.

tomllib keeps no positions. This looks at headers and keys alone, which is enough to send a reader to the line.
"""

import re
from collections import Counter

_HEADER = re.compile(r"\s*(\[{1,2})\s*([^\[\]]+?)\s*\]{1,2}\s*(?:#.*)?")
_KEY = re.compile(r"\s*([\w\"'. -]+?)\s*=")
_PATH = re.compile(r"(?:unknown key )?([\w.\[\]-]+)")
_RULE = re.compile(r"rule (\d+)\b")


def line(text: str, message: str) -> str:
    """Return `line N: ` of the setting that the message begins with, or of the nearest table around it."""
    rule = _RULE.match(message)
    path = f"rules[{rule[1]}]" if rule else found[1] if (found := _PATH.match(message)) else ""
    places = _places(text)
    while path:
        for place, number in places:
            if place == path or place.startswith((f"{path}.", f"{path}[")):
                return f"line {number}: "
        path = path.rpartition(".")[0]
    return ""


def _places(text: str) -> list[tuple[str, int]]:
    """Return the paths of all headers and keys, each with its line."""
    table, made = "", []
    counts: Counter[str] = Counter()
    for number, each in enumerate(text.split("\n"), 1):
        if header := _HEADER.fullmatch(each):
            table = _plain(header[2])
            if header[1] == "[[":
                counts[table] += 1
                table += f"[{counts[table]}]"
            made.append((table, number))
        elif key := _KEY.match(each):
            made.append((f"{table}.{_plain(key[1])}".lstrip("."), number))
    return made


def _plain(path: str) -> str:
    return re.sub(r"[\s\"']", "", path)
