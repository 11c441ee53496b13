"""Nearly valid examples: a valid input with a few changes."""

import json
import string
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

HOSTILE = (
    "",
    "\0",
    "\n",
    "\x1b[31m",
    "\u202e",
    "\udcff",
    "'",
    '"',
    "%s",
    "%~",
    "../..",
    "\ufeff",
    "INFO ready",
    "a" * 5000,
    "\N{PILE OF POO}",
)
"""Texts that often break parsers."""
NUMBERS = (
    0,
    -1,
    1,
    255,
    256,
    65535,
    65536,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    -(1 << 63),
)
JUNK = (
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\x80" * 10 + b"\x01",
    b"null",
    b"[]",
    b"{}",
    b"-1",
    b"1e400",
    b"[" * 5000,
    b"\r\n\r\n",
)

texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20))
numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(-(1 << 70), 1 << 70))
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(), texts, st.just([]), st.just({}), st.lists(st.none(), max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds, with up to four pieces changed, removed, repeated or inserted."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from((0, 1, 1, 1, 2, 4, 8, 64, 1 << 20)))
        piece = data[at : at + size]
        kind = draw(st.integers(0, 4))
        if kind == 0:
            fresh = draw(st.binary(max_size=8))
        elif kind == 1:
            fresh = draw(st.sampled_from(JUNK))
        elif kind == 2:
            fresh = b""
        elif kind == 3:
            fresh = (piece * 2)[:4096]
        else:
            bit = draw(st.integers(0, 7))
            fresh = bytes([piece[0] ^ 1 << bit]) + piece[1:] if piece else b"\0"
        data = data[:at] + fresh + data[at + size :]
    return data


@st.composite
def mutated_json(draw: st.DrawFn, seeds: Sequence[Any]) -> Any:
    """Return one of the values with up to three of its parts replaced, removed, or added to."""
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value)
    return value


def _changed(draw: st.DrawFn, value: Any) -> Any:
    if draw(st.integers(0, 3)) and isinstance(value, dict) and value:
        name = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 5)) == 0:
            return {key: each for key, each in value.items() if key != name}
        return {**value, name: _changed(draw, value[name])}
    if draw(st.integers(0, 3)) and isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        if draw(st.integers(0, 5)) == 0:
            return value[:at] + value[at + 1 :]
        return [*value[:at], _changed(draw, value[at]), *value[at + 1 :]]
    if isinstance(value, dict) and draw(st.booleans()):
        return {**value, draw(st.text(string.ascii_letters, max_size=4)): draw(scalars)}
    return draw(scalars)
