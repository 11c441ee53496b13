"""The conditions of filters: each makes a function from records to a mask of the rows that match."""

import difflib
import errno
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from producer.consume.addresses import is_within, network, parsed
from producer.consume.columns import Column, passing, text_to_map
from producer.events import CA_STATES, CAUSES, FLOWS, REASONS, RETRANSMITS, ROLES, STATES, TRANSMITS, Mask
from producer.schemas import load_schema
from producer.view.records import Records

Make = Callable[[str], Callable[[Records], Mask]]
Compare = Callable[[Any, Any], Any]

_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(%|us|ms|s|k|M|G)?")
_SCALES = {"": 1.0, "%": 0.01, "us": 1.0, "ms": 1e3, "s": 1e6, "k": 1e3, "M": 1e6, "G": 1e9}
_TIMES = {"us", "ms", "s"}
_MAX_PORT = 65535
_ALIASES = {
    "srtt": "srtt_us", "mdev": "mdev_us", "min_rtt": "min_rtt_us", "rto": "rto_us", "connect": "connect_us",
    "cwnd": "snd_cwnd", "ssthresh": "snd_ssthresh", "lost": "lost_out", "retrans": "total_retrans",
}  # fmt: skip
_RATIO = "ratio"


class Expected(ValueError):
    """A value is wrong; the text says what was expected."""


class Condition(NamedTuple):
    """Makes a condition from its value; `expected` describes the value."""

    make: Make
    expected: str


def _numeric_fields() -> dict[str, str]:
    """Return the field of each name that can be compared with a number."""
    fields = [field for each in (TRANSMITS, RETRANSMITS, FLOWS) for field in load_schema(each.schema_file)["fields"]]
    kinds = {field["name"]: field["type"][1] if isinstance(field["type"], list) else field["type"] for field in fields}
    return {name: name for name, kind in kinds.items() if kind in ("int", "long")} | _ALIASES


_FIELDS = _numeric_fields()
NUMBERS = {*_FIELDS, _RATIO}
"""Names that can be compared with a number."""


def any_of(masks: Iterable[Mask]) -> Mask:
    """Return which rows are in one of the masks."""
    return functools.reduce(np.logical_or, masks)


def all_of(masks: Iterable[Mask]) -> Mask:
    """Return which rows are in all masks."""
    return functools.reduce(np.logical_and, masks)


def compare(name: str, operator: Compare, text: str) -> Callable[[Records], Mask]:
    """Return the condition that a number of a record compares so with the number in `text`."""
    match = _NUMBER.fullmatch(text)
    suffix = (match[2] or "") if match else ""
    is_time = _FIELDS.get(name, "").endswith("_us")
    own = _TIMES if is_time else {"%"} if name == _RATIO else {"k", "M", "G"}
    if match is None or (suffix not in own if suffix else _is_ambiguous(name, float(match[1]))):
        hint = "a time such as 200ms" if is_time else "a ratio such as 1%" if name == _RATIO else "a number such as 10"
        raise Expected(hint)
    least = float(match[1]) * _SCALES[suffix]

    def mask(records: Records) -> Mask:
        numbers, valid = _ratio(records) if name == _RATIO else records[_FIELDS[name]][:2]
        if least and _FIELDS.get(name) == "srtt_us":  # 0 before the first measurement
            valid = valid & (numbers != 0)
        chosen: Mask = valid & operator(numbers, least)
        return chosen

    return mask


def _is_ambiguous(name: str, number: float) -> bool:
    """Whether a number without a unit may be meant in another one: milliseconds, or percent."""
    return abs(number) >= 1 if name == _RATIO else number != 0 and _ALIASES.get(name, "").endswith("_us")


def _ratio(records: Records) -> tuple[Any, Mask]:
    """Return the retransmitted share of the segments that a connection has sent, its SYN-ACKs included."""
    retransmitted, sent = records["total_retrans"], records["segs_out"]
    syn_acks = records["retrans_syn_ack"].cells + _by_text(records["role"], "server".__eq__)
    segments = sent.cells + syn_acks
    return retransmitted.cells / np.maximum(segments, 1), retransmitted.valid & sent.valid & (segments > 0)


def _by_text(column: Column, matches: Callable[[str], bool]) -> Mask:
    return passing(column.cells, column.valid, column.texts or (), matches)


def _pattern(field: str) -> Condition:
    def make(text: str) -> Callable[[Records], Mask]:
        matches = [re.compile(fnmatch.translate(part)).match for part in _parts(text, f"a name ({field} web-1, web-*)")]
        return lambda records: _by_text(records[field], lambda value: any(each(value) for each in matches))

    return Condition(make, f"a name; * and ? are wildcards ({field} web-*)")


def _container(text: str) -> Callable[[Records], Mask]:
    starts = tuple(_parts(text.lower(), "the beginning of a container id"))
    return lambda records: _by_text(records["container"], lambda value: value.startswith(starts))


def _one_of(field: str, names: Sequence[str]) -> Condition:
    expected = f"one of {', '.join(names)}" if len(names) < len(errno.errorcode) else "an errno (ETIMEDOUT, ...)"

    def make(text: str) -> Callable[[Records], Mask]:
        chosen = _chosen(text, names, expected)
        return lambda records: _by_text(records[field], chosen.__contains__)

    return Condition(make, expected)


def _cause(text: str) -> Callable[[Records], Mask]:
    """A connection matches if it has had such a retransmission."""
    chosen = sorted(_chosen(text, CAUSES, f"one of {', '.join(CAUSES)}"))

    def mask(records: Records) -> Mask:
        if records.stream != FLOWS:
            return _by_text(records["cause"], chosen.__contains__)
        columns = [records[f"retrans_{cause}"] for cause in chosen]
        return any_of(column.valid & (column.cells > 0) for column in columns)

    return mask


LABEL = "label"
"""The condition with the name of a label, and = or != and its values."""
OF_LABEL = "the name of a label (label env=prod)"
VALUE_OF_LABEL = "the value of a label; * and ? are wildcards (label env=prod,test-*)"


def label(name: str, text: str | None, *, is_not: bool = False) -> Callable[[Records], Mask]:
    """Return the condition that a host has a label, with a value like one of those in `text`, or like none of them."""
    patterns = None if text is None else [re.compile(fnmatch.translate(each)) for each in _parts(text, VALUE_OF_LABEL)]

    def matches(labels: str) -> bool:
        value = text_to_map(labels).get(name)
        if value is None or patterns is None:
            return value is not None
        return is_not != any(each.match(value) for each in patterns)

    return lambda records: _by_text(records["labels"], matches)


def _parts(text: str, expected: str) -> list[str]:
    parts = text.split(",")
    if not all(parts):
        raise Expected(expected)
    return parts


def _chosen(text: str, names: Sequence[str], expected: str) -> set[str]:
    known = {name.lower(): name for name in names}
    parts = [part.lower() for part in _parts(text, expected)]
    if not known.keys() >= set(parts):
        raise Expected(expected)
    return {known[part] for part in parts}


_ADDRESS = "an address or a network (10.2.0.0/16, 2001:db8::/32)"


def _address(*fields: str) -> Condition:
    def make(text: str) -> Callable[[Records], Mask]:
        try:
            networks = [network(part) for part in text.split(",")]
        except ValueError:
            raise Expected(_ADDRESS) from None
        return lambda records: any_of(
            _by_text(records[field], lambda value: is_within(value, networks)) for field in fields
        )

    return Condition(make, _ADDRESS)


def _is_address(text: str) -> bool:
    """Return whether a text is an address or a network, with any prefix."""
    return parsed(text.partition("/")[0]) is not None


_PORT = f"a port from 0 to {_MAX_PORT}, or a range (8000-8099)"


def _port(*fields: str) -> Condition:
    def make(text: str) -> Callable[[Records], Mask]:
        spans = [_span(part) for part in text.split(",")]

        def mask(records: Records) -> Mask:
            columns = [records[field] for field in fields]
            return any_of(
                each.valid & (each.cells >= low) & (each.cells <= high) for each in columns for low, high in spans
            )

        return mask

    return Condition(make, _PORT)


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 0 <= low <= high <= _MAX_PORT:
        raise Expected(_PORT)
    return low, high


def _host(text: str) -> Callable[[Records], Mask]:
    """Addresses and networks also match at either end of a connection, as in tcpdump, where a host is an address."""
    by_name = _pattern("host").make(text)
    addresses = ",".join(part for part in text.split(",") if _is_address(part))
    if not addresses:
        return by_name
    by_address = CONDITIONS["addr"].make(addresses)
    return lambda records: by_name(records) | by_address(records)


def _number(field: str) -> Condition:
    expected = f"a number ({field} 1000)"

    def make(text: str) -> Callable[[Records], Mask]:
        if not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", text):
            raise Expected(expected)
        numbers = [int(part) for part in text.split(",")]
        return lambda records: records[field].valid & np.isin(records[field].cells, numbers)

    return Condition(make, expected)


CONDITIONS = {
    "host": Condition(_host, _pattern("host").expected),
    "peer": _address("daddr"),
    "local": _address("saddr"),
    "addr": _address("saddr", "daddr"),
    "port": _port("sport", "dport"),
    "sport": _port("sport"),
    "dport": _port("dport"),
    "cause": Condition(_cause, f"one of {', '.join(CAUSES)}"),
    "unit": _pattern("unit"),
    "container": Condition(_container, "the beginning of a container id"),
    "comm": _pattern("comm"),
    "cgroup": _pattern("cgroup"),
    "state": _one_of("state", STATES),
    "ca_state": _one_of("ca_state", CA_STATES),
    "error": _one_of("error", [*errno.errorcode.values()]),
    "role": _one_of("role", ROLES),
    "reason": _one_of("reason", REASONS),
    "netns": _number("netns"),
    "pid": _number("pid"),
    "uid": _number("uid"),
}
"""By name; values of all may be lists with commas."""

_ELSEWHERE = {"src": "local", "dst": "peer", "net": "addr", "ip": "addr", "proc": "comm", "process": "comm"}
"""What other tools call conditions."""


def meant(word: str) -> str | None:
    """Return what a word that is not a condition may have meant."""
    if _is_address(word):
        return f"'addr {word}'"
    if word in _ELSEWHERE:
        return repr(_ELSEWHERE[word])
    near = difflib.get_close_matches(word.lower(), [*CONDITIONS, LABEL, *NUMBERS], 1)
    return repr(near[0]) if near else None
