"""The tables decide as going through the rules one by one does, for every list of rules and every segment."""

import ipaddress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from producer.rules import Action, PortRange, Rule, Segment, first_match, tables

# Few addresses, ports and numbers, so that rules and segments meet.
ADDRESSES = [ipaddress.ip_address(a) for a in ("10.0.0.1", "10.0.0.2", "10.0.1.1", "11.0.0.1", "::1", "2001:db8::1")]
MAPPED = ipaddress.ip_address("::ffff:10.0.0.1")
NUMBERS = st.integers(1, 4)
ABOVE = {1: (), 2: (1,), 3: (2, 1), 4: (1,)}


@st.composite
def networks(draw: st.DrawFn) -> Any:
    address = draw(st.sampled_from(ADDRESSES))
    return ipaddress.ip_network(f"{address}/{draw(st.integers(0, address.max_prefixlen))}", strict=False)


@st.composite
def port_ranges(draw: st.DrawFn) -> PortRange:
    low = draw(st.sampled_from([0, 1, 80, 443, 8000, 65534, 65535]))
    return low, min(65535, low + draw(st.sampled_from([0, 1, 400, 65535])))


def lists(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(of, max_size=3).map(tuple)


RULES = st.lists(
    st.builds(
        Rule,
        name=st.just("r"),
        address=lists(networks()),
        local_address=lists(networks()),
        remote_address=lists(networks()),
        port=lists(port_ranges()),
        local_port=lists(port_ranges()),
        remote_port=lists(port_ranges()),
        netns=lists(NUMBERS),
        cgroup=lists(NUMBERS),
        uid=lists(NUMBERS),
        interface=lists(NUMBERS),
        state=lists(st.sampled_from(["ESTABLISHED", "SYN_SENT"])),
    ),
    max_size=8,
)
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


@given(RULES, st.lists(SEGMENTS, max_size=10))
def test_tables_decide_as_the_rules_do(rules: list[Rule], segments: list[Segment]) -> None:
    compiled = tables(rules, Action(), ABOVE)
    for segment in segments:
        expected = first_match(rules, segment)
        assert compiled.decide(segment) == (len(rules) if expected is None else expected)


@given(RULES)
def test_a_table_names_a_value_once(rules: list[Rule]) -> None:
    compiled = tables(rules, Action())
    keys = [(prefix, length) for prefix, length, _ in compiled.prefixes]
    assert len(keys) == len(set(keys))
    assert len(compiled.address_classes) == len(set(compiled.address_classes))


def test_a_thousand_rules_and_a_hundred_thousand_addresses_compile() -> None:
    peers = tuple(ipaddress.ip_network(0x0B000000 + i) for i in range(100_000))
    rules = [Rule(str(i), local_port=((i + 1, i + 1),), uid=(i,)) for i in range(1023)]
    compiled = tables([Rule("peers", remote_address=peers), *rules], Action())
    assert len(compiled.prefixes) == 100_000
    assert compiled.decide(Segment(ADDRESSES[0], peers[77_777].network_address, 1, 1)) == 0
    assert compiled.decide(Segment(ADDRESSES[0], ADDRESSES[1], 700, 1, uid=699)) == 700
    assert compiled.decide(Segment(ADDRESSES[0], ADDRESSES[1], 700, 1, uid=698)) == 1024
