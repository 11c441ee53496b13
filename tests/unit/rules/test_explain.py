"""`--explain` names the rule that decides, and the earlier ones that might."""

import ipaddress

import pytest

from producer.errors import UsageError
from producer.rules.explain import explain
from producer.rules.tables import Action, Rule

NETWORK = (ipaddress.ip_network("10.0.0.0/8"),)
DROP = Action(transmit=False, retransmit=False, flow=False)


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        Rule("other", remote_port=((1, 1),)),
        Rule("web", Action(sample_rate=10), local_port=((443, 443),)),
        Rule("rule 3"),
    ]
    lines = explain(rules, DROP, "10.0.0.1:443,10.0.0.2:5000")
    assert lines == [
        "rule 2 (web) decides: transmits kept, retransmits kept, flows kept, 1 in 10 transmits sampled by connection"
    ]


def test_a_rule_with_other_conditions_may_decide() -> None:
    rules = [Rule("mine", uid=(1000,), address=NETWORK), Rule("rule 2", DROP, address=NETWORK)]
    lines = explain(rules, Action(), "[2001:db8::1]:1,10.0.0.2:5000")
    assert lines == [
        "rule 1 (mine) decides if uid match: transmits kept, retransmits kept, flows kept",
        "rule 2 decides: transmits dropped, retransmits dropped, flows dropped",
    ]


def test_the_default_decides_if_no_rule_does() -> None:
    assert explain([Rule("r", address=NETWORK)], DROP, "192.0.2.1:1,192.0.2.2:2") == [
        "the default decides: transmits dropped, retransmits dropped, flows dropped"
    ]


@pytest.mark.parametrize("text", ["10.0.0.1:443", "a:1,b:2", "10.0.0.1:70000,10.0.0.2:1", "10.0.0.1,10.0.0.2"])
def test_anything_but_a_pair_of_endpoints_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="--explain: expected LOCAL,REMOTE"):
        explain([], Action(), text)
