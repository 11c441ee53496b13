"""Filters match the rows that a plain evaluation of the same words matches, and say what is wrong with wrong ones."""

import contextlib
import fnmatch
import ipaddress
import operator
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.errors import UsageError
from producer.events import CAUSES, FLOWS, RETRANSMITS
from producer.view.filter import FilterError, parse
from producer.view.records import Records

HOSTS = ("web-1", "web-17", "db-1")
PEERS = ("10.2.0.9", "10.3.0.1", "2001:db8::7")
PORTS = (22, 443, 8080)
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
             "!=": operator.ne}  # fmt: skip

maybe = st.none() | st.integers(0, 5)
FLOW = st.fixed_dictionaries(
    {
        "host": st.sampled_from(HOSTS),
        "daddr": st.sampled_from(PEERS),
        "sport": st.sampled_from(PORTS),
        "dport": st.sampled_from(PORTS),
        "unit": st.none() | st.sampled_from(("nginx.service", "ssh.service")),
        "labels": st.dictionaries(st.sampled_from(("env", "dc")), st.sampled_from(("prod", "test-1", "a b"))),
        "srtt_us": st.none() | st.just(0) | st.integers(1, 5000),
        "role": st.none() | st.sampled_from(("client", "server")),
        "segs_out": maybe,
        "total_retrans": maybe,
        **{f"retrans_{cause}": maybe for cause in CAUSES},
    }
)
RETRANSMIT = st.fixed_dictionaries(
    {
        "host": st.sampled_from(HOSTS),
        "daddr": st.sampled_from(PEERS),
        "sport": st.sampled_from(PORTS),
        "dport": st.sampled_from(PORTS),
        "unit": st.none() | st.sampled_from(("nginx.service", "ssh.service")),
        "labels": st.dictionaries(st.sampled_from(("env", "dc")), st.sampled_from(("prod", "test-1", "a b"))),
        "srtt_us": st.none() | st.just(0) | st.integers(1, 5000),
        "total_retrans": maybe,
        "cause": st.sampled_from(CAUSES),
    }
)
LEAF = st.one_of(
    st.tuples(st.just("host"), st.sampled_from(("web-1", "web-*", "db-?", "web-1,db-1"))),
    st.tuples(st.just("peer"), st.sampled_from(("10.2.0.0/16", "10.3.0.1", "2001:db8::/32", "0.0.0.0/0"))),
    st.tuples(st.just("port"), st.sampled_from(("22", "400-500", "22,8080"))),
    st.tuples(st.just("unit"), st.sampled_from(("nginx.service", "*"))),
    st.tuples(st.just("cause"), st.sampled_from((*CAUSES, "rto,tlp"))),
    st.tuples(st.just("label"), st.sampled_from(("env", "dc", "rack"))),
    st.tuples(
        st.just("label"),
        st.sampled_from(("env", "dc")),
        st.sampled_from(("=", "!=")),
        st.sampled_from(("prod", "prod,test-*", '"a b"', "*")),
    ),
    st.tuples(st.just("srtt"), st.sampled_from(tuple(OPERATORS)), st.sampled_from(("0", "2ms", "1500us", "0.001s"))),
    st.tuples(st.just("ratio"), st.sampled_from(tuple(OPERATORS)), st.sampled_from(("1%", "0.5", "100%"))),
)
TREE = st.recursive(
    LEAF,
    lambda inner: st.one_of(st.tuples(st.just("not"), inner), st.tuples(st.sampled_from(("and", "or")), inner, inner)),
    max_leaves=6,
)


def words(tree: Any) -> str:
    """Return a tree as the text of a filter."""
    match tree:
        case ("not", inner):
            return f"not ({words(inner)})"
        case ("and" | "or" as name, left, right):
            return f"({words(left)}) {name} ({words(right)})"
    return " ".join(tree)


def number(text: str) -> float:
    for suffix, scale in (("us", 1.0), ("ms", 1e3), ("s", 1e6), ("%", 0.01)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * scale
    return float(text)


def matches(tree: Any, row: Mapping[str, Any]) -> bool:
    """Evaluate a tree for one record."""
    match tree:
        case ("not", inner):
            return not matches(inner, row)
        case ("and", left, right):
            return matches(left, row) and matches(right, row)
        case ("or", left, right):
            return matches(left, row) or matches(right, row)
        case ("srtt", sign, text):
            is_known = row["srtt_us"] is not None and (row["srtt_us"] != 0 or text == "0")
            return is_known and OPERATORS[sign](row["srtt_us"], number(text))
        case ("ratio", sign, text):
            sent, again = row.get("segs_out"), row["total_retrans"]
            if sent is None or again is None:
                return False
            sent += (row["retrans_syn_ack"] or 0) + (row["role"] == "server")
            return sent > 0 and OPERATORS[sign](again / sent, number(text))
        case ("host" | "unit" as name, text):
            return row[name] is not None and any(fnmatch.fnmatchcase(row[name], each) for each in text.split(","))
        case ("label", name):
            return name in row["labels"]
        case ("label", name, sign, text):
            value = row["labels"].get(name)
            found = any(fnmatch.fnmatchcase(value or "", each) for each in text.strip('"').split(","))
            return value is not None and found == (sign == "=")
        case ("peer", text):
            return ipaddress.ip_address(row["daddr"]) in ipaddress.ip_network(text)
        case ("port", text):
            spans = [(part.split("-") * 2)[:2] for part in text.split(",")]
            return any(int(low) <= row[side] <= int(high) for low, high in spans for side in ("sport", "dport"))
        case ("cause", text):
            if "cause" in row:
                return row["cause"] in text.split(",")
            return any(row[f"retrans_{each}"] for each in text.split(","))
    raise AssertionError(tree)


def test_ipv4_mapped_addresses_are_ipv4_as_in_records() -> None:
    rows = [{"daddr": address} for address in ("10.2.0.7", "10.2.1.7", "2001:db8::7")]
    for text, expected in (
        ("::ffff:10.2.0.7", [True, False, False]),
        ("::FFFF:10.2.0.0/112", [True, True, False]),
        ("::/0", [False, False, True]),
    ):
        assert parse(f"peer {text}")(Records.from_rows(FLOWS, rows)).tolist() == expected


@given(TREE, st.lists(FLOW, min_size=1, max_size=8))
def test_masks_of_connections_equal_a_plain_evaluation(tree: Any, rows: list[dict[str, Any]]) -> None:
    assert parse(words(tree))(Records.from_rows(FLOWS, rows)).tolist() == [matches(tree, row) for row in rows]


@given(TREE, st.lists(RETRANSMIT, min_size=1, max_size=8))
def test_masks_of_retransmissions_equal_a_plain_evaluation(tree: Any, rows: list[dict[str, Any]]) -> None:
    assert parse(words(tree))(Records.from_rows(RETRANSMITS, rows)).tolist() == [matches(tree, row) for row in rows]


def test_and_binds_tighter_than_or() -> None:
    rows = Records.from_rows(RETRANSMITS, [{"sport": port, "dport": port, "host": "a"} for port in PORTS])
    assert parse("port 22 or port 443 and host b")(rows).tolist() == [True, False, False]
    assert parse("(port 22 or port 443) and ! host b")(rows).tolist() == [True, True, False]


def test_an_empty_filter_matches_everything() -> None:
    assert parse("  ")(Records.from_rows(RETRANSMITS, [{"host": "a"}])).tolist() == [True]


def test_a_field_that_records_do_not_have_matches_nothing() -> None:
    rows = Records.from_rows(RETRANSMITS, [{"host": "a"}])
    assert parse("comm nginx or pid 1 or error ETIMEDOUT or segs_out > 0")(rows).tolist() == [False]


def test_a_round_trip_time_that_is_not_measured_is_not_short() -> None:
    rows = Records.from_rows(FLOWS, [{"srtt_us": srtt_us} for srtt_us in (None, 0, 900)])
    assert parse("srtt < 1ms")(rows).tolist() == [False, False, True]
    assert parse("srtt = 0")(rows).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("text", "at", "expected", "found"),
    [
        ("host web-17 and cause rot", "rot", "one of other, rto", "'rot'"),
        ("peer 10.2.0.0/33", "10.2", "an address or a network", "'10.2.0.0/33'"),
        ("port 80 and", "", "a condition", "the end"),
        ("port 70000", "7", "a port from 0 to 65535", "'70000'"),
        ("port 9-1", "9", "a port", "'9-1'"),
        ("(port 80", "", "'and', 'or' or ')'", "the end"),
        ("port 80)", ")", "'and', 'or' or the end", "')'"),
        ("port 80 host a", "host", "'and', 'or' or the end", "'host'"),
        ("hots web", "hots", "a condition", "'hots'"),
        ("ratio 1%", "1%", "a comparison", "'1%'"),
        ("ratio > 1ms", "1ms", "a ratio such as 1%", "'1ms'"),
        ("srtt > 10%", "10%", "a time such as 200ms", "'10%'"),
        ("srtt > 200", "200", "a time such as 200ms", "'200'"),
        ("rto > 1k", "1k", "a time such as 200ms", "'1k'"),
        ("ratio > 1k", "1k", "a ratio such as 1%", "'1k'"),
        ("ratio > 5", "5", "a ratio such as 1%", "'5'"),
        ("cwnd > ten", "ten", "a number", "'ten'"),
        ("host and port 80", "and", "a name", "'and'"),
        ("host a,,b", "a,,b", "a name", "'a,,b'"),
        ('comm "half', '"', "a name", "'\"'"),
        ("pid x", "x", "a number", "'x'"),
        ("label", "", "the name of a label", "the end"),
        ("label =prod", "=", "the name of a label", "'='"),
        ("label env=", "", "the value of a label", "the end"),
        ("label env=prod,", "prod", "the value of a label", "'prod,'"),
        ("label env>prod", ">", "'and', 'or' or the end", "'>'"),
        ("=", "=", "a condition", "'='"),
        ("not " * 60 + "port 1", None, "at most 50 levels", ""),
        ("(" * 5000, None, "at most 50 levels", ""),
    ],
)
def test_a_wrong_filter_is_shown_with_a_caret(text: str, at: str | None, expected: str, found: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    assert f"expected {expected}" in str(caught.value)
    assert str(caught.value).split(", found ")[-1].startswith(found)
    shown, caret = caught.value.details
    if at is not None:
        assert shown[caret.index("^") :].startswith(at)
        assert caret.index("^") == len(shown) if not at else True
    assert caught.value.exit_code == UsageError.exit_code


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("prot 22", "port"),
        ("hots web", "host"),
        ("rtt > 3ms", "srtt"),
        ("dst 10.2.0.9", "peer"),
        ("10.2.0.9", "addr 10.2.0.9"),
        ("port 1 and 10.2.0.0/16", "addr 10.2.0.0/16"),
    ],
)
def test_a_wrong_condition_is_answered_with_the_nearest(text: str, meant: str) -> None:
    with pytest.raises(FilterError, match=f": did you mean '{meant}'\\?$"):
        parse(text)


def test_the_address_of_a_host_matches_either_end_as_in_tcpdump() -> None:
    ends = [("web-1", "10.2.0.9", "10.3.0.1"), ("web-1", "10.3.0.1", "10.2.0.9"), ("10.2.0.9", "10.3.0.1", "10.3.0.2")]
    rows = Records.from_rows(FLOWS, [dict(zip(("host", "saddr", "daddr"), each, strict=True)) for each in ends])
    assert parse("host 10.2.0.9")(rows).tolist() == [True, True, True]
    assert parse("host 10.2.0.8,web-1")(rows).tolist() == [True, True, False]
    assert parse("host 10.2.0.8")(rows).tolist() == [False, False, False]
    assert parse("host 10.2.0.0/16 and not host web-*")(rows).tolist() == [False, False, False]
    with pytest.raises(FilterError, match="expected an address or a network"):
        parse("host 10.2.0.0/33")


WORDS = [
    "label",
    "=",
    "!=",
    "host",
    "port",
    "(",
    ")",
    "and",
    "or",
    "not",
    ">",
    "1%",
    ",",
    "web",
    "10.0.0.0/8",
    '"',
    "ratio",
]


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_is_a_filter_or_one_kind_of_error(text: str) -> None:
    fields = {"host": "web", "sport": 1, "dport": 2, "daddr": "10.0.0.1", "labels": {"web": "web"}}
    rows = Records.from_rows(RETRANSMITS, [fields])
    with contextlib.suppress(FilterError):
        assert len(parse(text)(rows)) == 1
