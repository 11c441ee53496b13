"""The tables decide as going through the rules one by one does, for every list of rules and every segment."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.rules.tables import Action, PortRange, Rule, Segment, tables
from tests.support.rules import decide, first_match

# Few addresses, ports and numbers, so that rules and segments meet.
ADDRESSES = [
    ipaddress.ip_address(address)
    for address in ("10.0.0.1", "10.0.0.2", "10.0.1.1", "11.0.0.1", "::1", "2001:db8::1", "::fffe:a00:1", "::1:0:a00:1")
]
MAPPED = ipaddress.ip_address("::ffff:10.0.0.1")
NUMBERS = st.integers(1, 4)
ABOVE = {1: (), 2: (1,), 3: (2, 1), 4: (1,)}


@st.composite
def networks(draw: st.DrawFn) -> Any:
    address = draw(st.sampled_from([*ADDRESSES, MAPPED]))
    return ipaddress.ip_network(f"{address}/{draw(st.integers(0, address.max_prefixlen))}", strict=False)


@st.composite
def port_ranges(draw: st.DrawFn) -> PortRange:
    low = draw(st.sampled_from([0, 1, 80, 443, 8000, 65534, 65535]))
    return low, min(65535, low + draw(st.sampled_from([0, 1, 400, 65535])))


CONDITIONS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("address", "local_address", "remote_address"), networks()),
    **dict.fromkeys(("port", "local_port", "remote_port"), port_ranges()),
    **dict.fromkeys(("netns", "cgroup", "uid", "interface"), NUMBERS),
    "state": st.sampled_from(["ESTABLISHED", "SYN_SENT"]),
}


@st.composite
def conditional(draw: st.DrawFn) -> Rule:
    """A rule with at most two conditions: one with more hardly ever decides."""
    names = draw(st.lists(st.sampled_from(list(CONDITIONS)), min_size=1, max_size=2, unique=True))
    return Rule("r", **{name: tuple(draw(st.lists(CONDITIONS[name], max_size=3))) for name in names})


RULES = st.lists(conditional(), max_size=8)
PORTS = st.sampled_from([0, 1, 2, 79, 80, 81, 443, 480, 481, 8000, 65534, 65535])
SEGMENTS = st.builds(
    Segment,
    local=st.sampled_from([*ADDRESSES, MAPPED]),
    remote=st.sampled_from(ADDRESSES),
    local_port=PORTS,
    remote_port=PORTS,
    netns=st.none() | NUMBERS,
    cgroups=st.sampled_from([(), *((cgroup, *above) for cgroup, above in ABOVE.items())]),
    uid=st.none() | NUMBERS,
    interface=st.none() | NUMBERS,
    state=st.none() | st.sampled_from(["ESTABLISHED", "SYN_SENT", "CLOSE"]),
)


MAPPED_NETWORK = ipaddress.ip_network("::ffff:0:0/96")


def takes(network: Any, address: Any) -> bool:
    """Whether a network has an address: each family by itself, and a mapped address or network is one of IPv4."""
    address = getattr(address, "ipv4_mapped", None) or address
    if network.version == 6 and network.subnet_of(MAPPED_NETWORK):
        first = network.network_address.ipv4_mapped
        network = ipaddress.ip_network(f"{first}/{network.prefixlen - 96}")
    return address.version == network.version and address in network


def matches(rule: Rule, segment: Segment) -> bool:
    """An independent matcher."""
    local, remote = segment.local, segment.remote
    local_port, remote_port = segment.local_port, segment.remote_port
    conditions = [
        (rule.address, lambda each: takes(each, local) or takes(each, remote)),
        (rule.local_address, lambda each: takes(each, local)),
        (rule.remote_address, lambda each: takes(each, remote)),
        (
            rule.port,
            lambda each: local_port in range(each[0], each[1] + 1) or remote_port in range(each[0], each[1] + 1),
        ),
        (rule.local_port, lambda each: local_port in range(each[0], each[1] + 1)),
        (rule.remote_port, lambda each: remote_port in range(each[0], each[1] + 1)),
        (rule.netns, lambda each: segment.netns == each),
        (rule.cgroup, lambda each: each in segment.cgroups),
        (rule.uid, lambda each: segment.uid == each),
        (rule.interface, lambda each: segment.interface == each),
        (rule.state, lambda each: segment.state == each),
    ]
    return all(not values or any(map(meets, values)) for values, meets in conditions)


@given(RULES, st.lists(SEGMENTS, min_size=10, max_size=20))
def test_the_first_rule_that_an_independent_matcher_finds_decides(rules: list[Rule], segments: list[Segment]) -> None:
    compiled = tables(rules, Action(), ABOVE)
    for segment in segments:
        expected = next((i for i, rule in enumerate(rules) if matches(rule, segment)), len(rules))
        assert decide(compiled, segment) == expected
        first = first_match(rules, segment)
        assert (len(rules) if first is None else first) == expected


@pytest.mark.parametrize(
    ("network", "taken"),
    [
        ("::/0", {"::1", "2001:db8::1"}),
        ("::/80", {"::1"}),
        ("::ffff:0:0/95", set()),
        ("::fffe:0:0/95", set()),
        ("0.0.0.0/0", {"10.0.0.1", "::ffff:10.0.0.1"}),
        ("::ffff:0:0/96", {"10.0.0.1", "::ffff:10.0.0.1"}),
        ("::ffff:10.0.0.0/104", {"10.0.0.1", "::ffff:10.0.0.1"}),
        ("::ffff:11.0.0.0/104", set()),
    ],
)
def test_a_network_of_one_family_takes_none_of_the_other(network: str, taken: set[str]) -> None:
    rules = [Rule("r", remote_address=(ipaddress.ip_network(network, strict=False),))]
    for text in ("10.0.0.1", "::ffff:10.0.0.1", "::1", "2001:db8::1"):
        segment = Segment(ipaddress.ip_address("10.9.9.9"), ipaddress.ip_address(text), 1, 2)
        assert (decide(tables(rules, Action()), segment) == 0) == (text in taken)
        assert (first_match(rules, segment) == 0) == (text in taken)


def test_ipv4_within_a_network_of_ipv6_has_its_own_rules() -> None:
    rules = [
        Rule("six", address=(ipaddress.ip_network("::/0"),)),
        Rule("four", address=(ipaddress.ip_network("10.0.0.0/8"),)),
        Rule("one", address=(ipaddress.ip_network("2001:db8::/32"),), remote_port=((9, 9),)),
    ]
    compiled = tables(rules, Action())
    four, six = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("2001:db8::1")
    assert decide(compiled, Segment(four, four, 1, 2)) == 1
    assert decide(compiled, Segment(six, six, 1, 2)) == 0
    other = ipaddress.ip_address("11.0.0.1")
    assert decide(compiled, Segment(other, other, 1, 2)) == 3


@given(RULES)
def test_a_table_names_a_value_once(rules: list[Rule]) -> None:
    compiled = tables(rules, Action())
    keys = [(prefix, length) for prefix, length, _ in compiled.prefixes]
    assert len(keys) == len(set(keys))
    assert len(compiled.address_classes) == len(set(compiled.address_classes))


@pytest.mark.slow
def test_a_thousand_rules_and_a_hundred_thousand_addresses_compile() -> None:
    peers = tuple(ipaddress.ip_network(0x0B000000 + i) for i in range(100_000))
    rules = [Rule(str(i), local_port=((i + 1, i + 1),), uid=(i,)) for i in range(1023)]
    compiled = tables([Rule("peers", remote_address=peers), *rules], Action())
    assert len(compiled.prefixes) == 100_000
    few = Rule("few", address=(ipaddress.ip_network("10.0.0.0/8"),))
    other = tables([few, *rules[1:], Rule("p", address=peers)], Action())
    assert {number for *_, number in other.prefixes[1:]} == {number for *_, number in compiled.prefixes}
    assert decide(compiled, Segment(ADDRESSES[0], peers[77_777].network_address, 1, 1)) == 0
    assert decide(compiled, Segment(ADDRESSES[0], ADDRESSES[1], 700, 1, uid=699)) == 700
    assert decide(compiled, Segment(ADDRESSES[0], ADDRESSES[1], 700, 1, uid=698)) == 1024
