"""Text that others choose: names from the operating system, and anything that goes to a terminal or a log.

`name` turns the bytes of a name into text that is always valid, printable and bounded, and can be turned back; it is
what events, metrics and messages carry. `printable` cleans a whole line on its way out.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

MAX_NAME = 1024
"""Most characters of an escaped name."""

_CUT = "%~"
_DIGEST_DIGITS = 16
_PLAIN = re.compile(r"[ -$&-~]*")


def name(raw: bytes, limit: int = MAX_NAME) -> str:
    """Return the text of a name: as it is where it is printable UTF-8, the rest percent-encoded (RFC 3986).

    Encoded are `%` itself, bytes that are not UTF-8, and characters that do not print. A name longer than `limit`
    characters keeps its beginning, followed by `%~` and 16 hexadecimal digits of the whole name's SHA-256.
    """
    text = raw.decode(errors="surrogateescape")
    if _PLAIN.fullmatch(text):
        pieces: list[str] | str = text
    else:
        pieces = [_escaped(character) for character in text]
    return _bounded(pieces, raw, limit)


def raw_name(text: str) -> bytes | None:
    """Return the bytes that `name` has made a text of; None where the name was cut."""
    return None if _CUT in text else unquote_to_bytes(text)


def printable(text: str) -> str:
    """Return a line in which nothing moves a cursor, changes a colour or begins another line.

    What does not print becomes an escape such as \\x1b or \\u202e; all else, backslashes too, stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _shown(character) for character in text)


def lines(texts: Iterable[str]) -> str:
    """Return texts as lines: a line break within a text begins no line."""
    return "\n".join(map(printable, texts))


def to_json(value: Any, *, compact: bool = False) -> str:
    """Return a value in JSON, all of it in printable ASCII; json.dumps leaves DEL as it is.

    Bytes become strings as in Avro's JSON encoding, a character for each.
    """
    text = json.dumps(value, separators=(",", ":") if compact else None, default=_bytes_text)
    return text.replace("\x7f", "\\u007f")


def _bytes_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _escaped(character: str) -> str:
    if character != "%" and character.isprintable():
        return character
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))


def _bounded(pieces: list[str] | str, raw: bytes, limit: int) -> str:
    """Join the pieces, of which none is cut apart."""
    if sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    tail = _CUT + hashlib.sha256(raw).hexdigest()[:_DIGEST_DIGITS]
    kept, room = [], limit - len(tail)
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    return "".join(kept) + tail


def _shown(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
