"""Untrusted text: names from the operating system, and output to a terminal or a log.

`name` converts the bytes of a name to valid, printable, bounded and reversible text, for events, metrics and messages.
`printable` escapes a line for output.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

MAX_NAME = 1024
"""Maximum length of an escaped name."""

_CUT = "%~"
_DIGEST_DIGITS = 16
_PLAIN = re.compile(r"[ -$&-~]*")
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters of Unicode's Default_Ignorable_Code_Point that Python takes for printable."""


def name(raw: bytes) -> str:
    """Return a name as text: printable UTF-8 stays, the rest is percent-encoded (RFC 3986).

    It encodes `%` itself, bytes that are not UTF-8, and unprintable characters. A name longer than MAX_NAME characters
    is cut, and `%~` and 16 hexadecimal digits of the SHA-256 of the full name are appended.
    """
    text = raw.decode(errors="surrogateescape")
    if _PLAIN.fullmatch(text):
        pieces: list[str] | str = text
    else:
        pieces = [_escaped(character) for character in text]
    return _bounded(pieces, raw)


def printable(text: str) -> str:
    """Escape characters that could move the cursor, change colors or start a new line, and those without a shape.

    Unprintable characters become escapes such as \\x1b or \\u202e; all others stay, including backslashes.
    """
    if text.isascii() and text.isprintable():
        return text
    escaped = "".join(character if character.isprintable() else _shown(character) for character in text)
    return _INVISIBLE.sub(lambda found: _shown(found[0]), escaped)


def lines(texts: Iterable[str]) -> str:
    """Join texts as lines; line breaks within a text are escaped."""
    return "\n".join(map(printable, texts))


def to_json(value: Any, *, compact: bool = False) -> str:
    """Return a value as JSON in printable ASCII; json.dumps does not escape DEL."""
    text = json.dumps(value, separators=(",", ":") if compact else None)
    return text.replace("\x7f", "\\u007f")


def parse_json(text: bytes | str) -> Any:
    """Parse JSON. Raises ValueError, also if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _escaped(character: str) -> str:
    if character != "%" and character.isprintable():
        return character
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))


def _bounded(pieces: list[str] | str, raw: bytes) -> str:
    """Join whole pieces up to the maximum length."""
    if sum(map(len, pieces)) <= MAX_NAME:
        return "".join(pieces)
    tail = _CUT + hashlib.sha256(raw).hexdigest()[:_DIGEST_DIGITS]
    kept, capacity = [], MAX_NAME - len(tail)
    for piece in pieces:
        capacity -= len(piece)
        if capacity < 0:
            break
        kept.append(piece)
    return "".join(kept) + tail


def _shown(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
