"""Filters: `host web-17 and peer 10.2.0.0/16 and not (cause tlp or port 22)`, compiled to masks of rows.

A condition never matches a null. Names are in docs/views.md.
"""

import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np

from producer.errors import UsageError
from producer.events import Mask
from producer.view.conditions import (
    CONDITIONS,
    LABEL,
    NUMBERS,
    OF_LABEL,
    VALUE_OF_LABEL,
    Compare,
    Expected,
    all_of,
    any_of,
    compare,
    label,
    meant,
)
from producer.view.records import Records

Filter = Callable[[Records], Mask]

_TOKEN = re.compile(
    r'\s*(?:(?P<mark>[()]|[<>]=?|!=|==?|&&|\|\||!)|"(?P<quoted>[^"]*)"|(?P<word>[^\s()<>=!&|"]+)|(?P<bad>\S))'
)
_COMPARISONS: dict[str, Compare] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal,
    "=": np.equal, "==": np.equal, "!=": np.not_equal,
}  # fmt: skip
_AND, _OR, _NOT = {"and", "&&"}, {"or", "||"}, {"not", "!"}
_KEYWORDS = _AND | _OR | _NOT
_MAX_DEPTH = 50
_MAX_LENGTH = 10_000


class FilterError(UsageError):
    """A filter is wrong; `details` show where."""

    def __init__(self, text: str, at: int, expected: str, found: str) -> None:
        super().__init__(f"filter: expected {expected}, found {found}")
        self.details = (f"  {text}", f"  {' ' * at}^")


class _Token(NamedTuple):
    text: str
    at: int
    kind: str


def parse(text: str) -> Filter:
    """Compile a filter; an empty one matches everything. Raises FilterError."""
    return _Parser(text).filter()


def _everything(records: Records) -> Mask:
    return np.ones(len(records), np.bool_)


class _Parser:
    """A recursive descent through the tokens."""

    def __init__(self, text: str) -> None:
        self._text = re.sub(r"\s", " ", text).strip()
        self._tokens = [
            _Token(match[match.lastgroup], match.start(match.lastgroup), match.lastgroup)
            for match in _TOKEN.finditer(self._text[:_MAX_LENGTH])
            if match.lastgroup
        ]
        self._next = 0
        self._depth = 0

    def filter(self) -> Filter:
        if len(self._text) > _MAX_LENGTH:
            raise UsageError(f"filter: longer than {_MAX_LENGTH} characters")
        if not self._tokens:
            return _everything
        whole = self._any_of()
        if self._peek() is not None:
            self._fail("'and', 'or' or the end")
        return whole

    def _any_of(self) -> Filter:
        parts = [self._all_of()]
        while self._take(_OR):
            parts.append(self._all_of())
        return parts[0] if len(parts) == 1 else lambda records: any_of(part(records) for part in parts)

    def _all_of(self) -> Filter:
        parts = [self._one()]
        while self._take(_AND):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else lambda records: all_of(part(records) for part in parts)

    def _one(self) -> Filter:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._fail(f"at most {_MAX_DEPTH} levels of parentheses and 'not'")
        try:
            if self._take(_NOT):
                inner = self._one()
                return lambda records: ~inner(records)
            if self._take({"("}):
                inner = self._any_of()
                if not self._take({")"}):
                    self._fail("'and', 'or' or ')'")
                return inner
            return self._condition()
        finally:
            self._depth -= 1

    def _condition(self) -> Filter:
        token = self._peek()
        if token is None or token.kind != "word" or token.text not in {*CONDITIONS, *NUMBERS, LABEL}:
            near = meant(token.text) if token is not None else None
            self._fail(
                "a condition" if near else f"a condition ({', '.join(CONDITIONS)}, {LABEL}, ratio, srtt, ...)", near
            )
        name = token.text
        self._next += 1
        if name == LABEL:
            return self._label()
        operator = self._peek()
        if name in NUMBERS and operator is not None and operator.text in _COMPARISONS:
            self._next += 1
            return self._value(lambda value: compare(name, _COMPARISONS[operator.text], value), "a number")
        if name not in CONDITIONS:
            self._fail("a comparison (<, <=, >, >=, =, !=)")
        return self._value(CONDITIONS[name].make, CONDITIONS[name].expected)

    def _label(self) -> Filter:
        """Return the condition of a label: `label env`, `label env=prod` or `label env!=prod`."""
        token = self._peek()
        if token is None or token.kind not in ("word", "quoted"):
            self._fail(OF_LABEL)
        name = token.text
        self._next += 1
        is_not = self._take({"!="})
        if not is_not and not self._take({"=", "=="}):
            return label(name, None)
        return self._value(lambda value: label(name, value, is_not=is_not), VALUE_OF_LABEL)

    def _value(self, make: Callable[[str], Filter], expected: str) -> Filter:
        token = self._peek()
        if token is None or token.kind not in ("word", "quoted") or (token.kind == "word" and token.text in _KEYWORDS):
            self._fail(expected)
        try:
            made = make(token.text)
        except Expected as error:
            self._fail(str(error))
        self._next += 1
        return made

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, texts: set[str]) -> bool:
        token = self._peek()
        if token is None or token.kind == "quoted" or token.text not in texts:
            return False
        self._next += 1
        return True

    def _fail(self, expected: str, near: str | None = None) -> NoReturn:
        token = self._peek()
        at, found = (len(self._text), "the end") if token is None else (token.at, repr(token.text))
        raise FilterError(self._text, at, expected, f"{found}: did you mean {near}?" if near else found)
