"""Which rule decides a connection: the output of `rebpf check --explain`. Pure."""

import ipaddress
from collections.abc import Sequence

from producer.errors import UsageError
from producer.host import endpoints
from producer.rules.tables import Action, Address, Rule, Segment, met

_OF_ENDPOINTS = frozenset({"address", "local_address", "remote_address", "port", "local_port", "remote_port"})


def explain(rules: Sequence[Rule], default: Action, endpoints: str) -> list[str]:
    """Return a line for each rule that the connection LOCAL,REMOTE reaches; the last one decides.

    An endpoint is `10.0.0.1:443` or `[2001:db8::1]:443`. If a rule also has conditions on other properties, its line
    names them. UsageError if `endpoints` is not a pair of endpoints.
    """
    segment = _segment(endpoints)
    lines: list[str] = []
    for number, rule in enumerate(rules, 1):
        results = met(rule, segment)
        if not all(result for condition, result in results.items() if condition in _OF_ENDPOINTS):
            continue
        open_conditions = [condition for condition in results if condition not in _OF_ENDPOINTS]
        name = rule.name if rule.name == f"rule {number}" else f"rule {number} ({rule.name})"
        if not open_conditions:
            return [*lines, f"{name} decides: {_text(rule.action)}"]
        lines.append(f"{name} decides if {' and '.join(open_conditions)} match: {_text(rule.action)}")
    return [*lines, f"the default decides: {_text(default)}"]


def _text(action: Action) -> str:
    words = ["transmits " + ("kept" if action.transmit else "dropped")]
    words.append("retransmits " + ("kept" if action.retransmit else "dropped"))
    words.append("flows " + ("kept" if action.flow else "dropped"))
    if action.sample_rate > 1:
        what = "transmits and retransmits" if action.sample_retransmits else "transmits"
        by = "by event" if action.sample_by_event else "by connection"
        words.append(f"1 in {action.sample_rate} {what} sampled {by}")
    return ", ".join(words)


def _segment(text: str) -> Segment:
    try:
        local, remote = map(_endpoint, text.split(","))
    except ValueError as error:
        example = "10.0.0.1:443,[2001:db8::1]:5000"
        raise UsageError(f"--explain: expected LOCAL,REMOTE such as {example}, found {text!r}") from error
    return Segment(local[0], remote[0], local[1], remote[1])


def _endpoint(text: str) -> tuple[Address, int]:
    address, port = endpoints.split(text)
    if not 0 <= port < 1 << 16:
        raise ValueError(f"{port} is not a port")
    return ipaddress.ip_address(address), port
