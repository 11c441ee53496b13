"""Rules on real records, from the project's encoder to the alerts."""

from collections.abc import Sequence
from typing import Any

import pytest

from producer.alert.engine import Engine, since
from producer.alert.model import Alert, Counts
from producer.config.alerts import AlertRule
from producer.consume.decode import Decoder
from producer.events import FLOWS, RETRANSMITS
from tests.support.events import Sent, messages
from tests.support.flows import Flow, values
from tests.support.topics import FIXED_IDS

S = 1_000_000_000
START_S = 1_800_000_000
"""A full minute."""
LOSS = AlertRule(name="loss", window_s=10, threshold=0.1, clear=0.05, minimum=10)


class Evaluation:
    """An engine that has read from `since_s` and decided up to `decided_s`, relative to START_S."""

    def __init__(
        self, *rules: AlertRule, decided_s: float = 0, since_s: float = -100, last_alerts: Sequence[Alert] = ()
    ) -> None:
        self.counts = Counts()
        decoder = Decoder(None)
        decided_ns, since_ns = (round((START_S + each) * S) for each in (decided_s, since_s))
        self.engine = Engine(rules, last_alerts, decided_ns, since_ns, decoder, self.counts)

    def flows(self, *flows: Flow) -> None:
        assert self.engine.put(FLOWS, values(flows), (START_S + 1000) * S) is None

    def retransmits(self, *events: Sent) -> None:
        made = [value for *_, value in messages(events, FIXED_IDS, "")]
        assert self.engine.put(RETRANSMITS, made, (START_S + 1000) * S) is None

    def decide(self, second: float) -> list[tuple[str, bool, float]]:
        return [(alert.group, alert.firing, alert.value) for alert in self.alerts(second)]

    def alerts(self, second: float) -> list[Alert]:
        return self.engine.decide(round((START_S + second) * S))


def flow(second: float, segs: int, retransmitted: int = 0, **fields: Any) -> Flow:
    start = fields.pop("start", 1)
    made = {"host": "web-1", "cookie": 7, "causes": {"fast": retransmitted} if retransmitted else {}, **fields}
    at_ms, start_ms = round((START_S + second) * 1000), None if start is None else round((START_S + start) * 1000)
    return Flow(at_ms=at_ms, start_ms=start_ms, segs=segs, **made)


def retransmit(number: int, second: float, segs: int = 1, **fields: Any) -> Sent:
    made = {"host": "web-1", "daddr": "192.0.2.1", "dport": 50_000, "cause": "rto", **fields}
    return Sent(RETRANSMITS, cpu_seq=number, at_ms=round((START_S + second) * 1000), segs=segs, **made)


def test_a_ratio_is_of_what_connections_did_in_the_window_not_since_they_began() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(5, 100), flow(15, 200, 20), flow(25, 1000, 20))
    assert run.decide(30) == [("web-1", True, 0.2), ("web-1", False, 0.0)]


def test_windows_wait_until_they_are_reached_and_late_records_are_counted() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(5, 100, 50))
    assert run.decide(9.9) == []
    assert run.decide(10) == [("web-1", True, 0.5)]
    run.flows(flow(9, 200, 150))
    assert run.counts.late == 1


def test_a_repeated_or_older_record_counts_nothing_also_after_the_close() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(2, 100, 10), flow(4, 200, 20, close=True))
    run.flows(flow(2, 100, 10), flow(4, 200, 20, close=True))
    (alert,) = run.alerts(10)
    assert (alert.segs, alert.retransmitted_segs) == (200, 20)


def test_records_out_of_order_in_a_batch_count_the_same() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(4, 200, 20), flow(2, 100, 10), flow(6, 300, 90))
    (alert,) = run.alerts(10)
    assert (alert.segs, alert.retransmitted_segs) == (300, 90)


@pytest.mark.parametrize("start", [None, -200])
def test_a_connection_that_began_before_everything_read_counts_from_its_second_record(start: float | None) -> None:
    run = Evaluation(LOSS)
    run.flows(flow(2, 1_000_000, 500_000, start=start), flow(4, 1_000_100, 500_020, start=start))
    (alert,) = run.alerts(10)
    assert (alert.segs, alert.retransmitted_segs) == (100, 20)


def test_a_restart_of_the_producer_counts_no_retransmission_twice() -> None:
    """It did not see the causes of earlier ones."""
    run = Evaluation(LOSS)
    run.flows(flow(5, 1000, causes={"fast": 500}, start=None), flow(15, 1100, causes={"other": 500}, start=None))
    run.flows(flow(25, 1200, causes={"other": 500, "fast": 20}, start=None))
    assert run.decide(30) == [("web-1", True, 0.2)]


def test_counters_of_32_bits_wrap() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(2, (1 << 32) - 50, start=None), flow(4, 50, 20, start=None))
    (alert,) = run.alerts(10)
    assert (alert.segs, alert.retransmitted_segs) == (100, 20)


def test_a_socket_that_connects_again_counts_from_its_beginning() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(2, 1000, 10, close=True), flow(5, 100, 100, start=4))
    (alert,) = run.alerts(10)
    assert (alert.segs, alert.retransmitted_segs) == (1100, 110)


def test_the_syn_acks_of_accepted_connections_are_segments_too() -> None:
    """So a ratio is that of the metrics and of nstat; segs_out has none of them."""
    run = Evaluation(LOSS)
    server = {"role": "server", "causes": {"syn_ack": 2, "fast": 1}}
    run.flows(flow(3, 4, close=True, **server), flow(5, 3, cookie=8), flow(15, 13, cookie=8, role="server"))
    (alert,) = run.alerts(10)
    assert (alert.segs, alert.retransmitted_segs) == (4 + 2 + 1 + 3, 3)


def test_equal_cookies_of_two_hosts_are_two_connections() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(2, 100), flow(2, 1000, 500, host="web-2"), flow(4, 200))
    assert run.decide(10) == [("web-2", True, 0.5)]


def test_a_group_with_little_traffic_does_not_fire_and_between_the_limits_nothing_changes() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(5, 9, 9), flow(15, 109, 19), flow(25, 209, 26), flow(35, 309, 29))
    assert run.decide(40) == [("web-1", True, 0.1), ("web-1", False, 0.03)]


def test_a_window_without_records_resolves() -> None:
    run = Evaluation(LOSS)
    run.flows(flow(5, 100, 50))
    assert run.decide(20) == [("web-1", True, 0.5), ("web-1", False, 0.0)]


def test_for_needs_the_threshold_in_all_windows() -> None:
    run = Evaluation(AlertRule(name="loss", window_s=10, for_s=20, threshold=0.1, clear=0.05))
    run.flows(flow(5, 100, 50), flow(15, 200, 50), flow(25, 300, 100), flow(35, 400, 150))
    assert run.decide(40) == []
    run.flows(flow(45, 500, 200))
    (alert,) = run.alerts(50)
    assert (alert.window_start_ns, alert.since_ns) == ((START_S + 40) * S, (START_S + 20) * S)


@pytest.mark.parametrize("decided_s", range(0, 60, 5))
def test_a_new_owner_sends_what_its_predecessor_did_not_and_nothing_twice(decided_s: int) -> None:
    rules = (LOSS, AlertRule(name="long", window_s=10, for_s=20, threshold=0.1, clear=0.05))
    totals = [(100, 50), (200, 90), (300, 110), (400, 140), (500, 140), (600, 190)]
    made = [flow(5 + 10 * at, *total) for at, total in enumerate(totals)]
    one = Evaluation(*rules)
    one.flows(*made)
    before, after = one.alerts(decided_s), one.alerts(80)
    assert len(before + after) == 6
    # The first two of the later alerts are sent, but not committed.
    last = {alert.key: alert for alert in before + after[:2]}.values()
    since_s = since(rules, (START_S + decided_s) * S, 10) / S - START_S
    two = Evaluation(*rules, decided_s=decided_s, since_s=since_s, last_alerts=list(last))
    two.flows(*[each for each in made if each.at_ms >= (START_S + since_s) * 1000])
    found = two.alerts(80)

    def key(alert: Alert) -> tuple[int, str]:
        return alert.window_start_ns, alert.rule

    assert sorted(found, key=key) == sorted(after[2:], key=key)


@pytest.mark.parametrize("decided_s", [10, 15, 19.9])
def test_a_new_owner_resolves_what_has_no_more_records(decided_s: float) -> None:
    one = Evaluation(LOSS)
    one.flows(flow(5, 100, 50))
    two = Evaluation(LOSS, decided_s=decided_s, last_alerts=one.alerts(10))
    (alert,) = two.alerts(50)
    assert (alert.firing, alert.window_start_ns) == (False, (START_S + 10) * S)


def test_an_alert_of_a_rule_that_is_gone_is_resolved() -> None:
    one = Evaluation(LOSS)
    one.flows(flow(5, 100, 50))
    fired = one.alerts(10)
    two = Evaluation(AlertRule(name="other"), last_alerts=fired)
    assert two.decide(10) == [("web-1", False, 0.5)]


def test_retransmissions_are_counted_by_segments_and_rate_and_once() -> None:
    run = Evaluation(AlertRule(name="many", by="peer", measure="count", window_s=10, threshold=30, clear=5))
    run.retransmits(retransmit(1, 1, 10), retransmit(2, 2, 2, sample_rate=10), retransmit(1, 1, 10))
    (alert,) = run.alerts(10)
    assert (alert.group, alert.value, alert.causes, run.counts.duplicate) == ("192.0.2.1", 30, "rto=30", 1)
    assert alert.flows == "web-1 10.0.0.1:443>192.0.2.1:50000=30"


def test_equal_ids_of_two_hosts_on_one_kernel_are_two_events() -> None:
    run = Evaluation(AlertRule(name="many", by="peer", measure="count", window_s=10, threshold=20))
    run.retransmits(*(retransmit(1, 1, 10, host=host, boot_id="same") for host in ("web-1", "web-2")))
    (alert,) = run.alerts(10)
    assert (alert.value, run.counts.duplicate) == (20, 0)


def test_failed_connects_are_counted_once_each_by_error() -> None:
    failing = {"state": "SYN_SENT", "close": True}
    made = [flow(n, 3, cookie=n, error="ETIMEDOUT" if n % 2 else "", sport=50_000 + n, **failing) for n in range(1, 6)]
    rule = AlertRule(name="fails", by="port", measure="failed_connects", window_s=10, threshold=1, clear=1)
    timeouts = AlertRule(**{**{n: getattr(rule, n) for n in rule.__slots__}, "name": "t", "cause": ("ETIMEDOUT",)})
    run = Evaluation(rule, timeouts)
    run.flows(*made, flow(6, 5, cookie=9, close=True), *made)
    one, two = run.alerts(10)
    assert (one.value, one.causes, two.value, two.causes) == (5, "ETIMEDOUT=3 closed=2", 3, "ETIMEDOUT=3")
    assert one.hosts == "web-1=5"


def test_a_quantile_of_round_trip_times_is_interpolated() -> None:
    run = Evaluation(AlertRule(name="slow", measure="srtt", quantile=0.5, window_s=10, threshold=0.1, clear=0.1))
    made = [flow(2, 1, cookie=n, srtt_us=n * 100_000) for n in range(4)]
    run.flows(*made, made[3])
    run.flows(made[3])  # copies count nothing
    run.flows(flow(4, 2, cookie=3, srtt_us=250_000))
    (alert,) = run.alerts(10)
    assert (alert.value, alert.segs) == (0.225, 4)
    assert alert.flows.startswith("web-1 10.0.0.1:40000>192.0.2.1:443=300000")


@pytest.mark.parametrize(
    ("by", "group"),
    [
        ("host", "web-1"),
        ("peer", "2001:db8::3"),
        ("subnet", "2001:db8::/64"),
        ("port", "443"),
        ("host+peer", "web-1 2001:db8::3"),
        ("flow", "web-1 10.0.0.1:40000>[2001:db8::3]:443"),
    ],
)
def test_groups(by: str, group: str) -> None:
    run = Evaluation(AlertRule(name="loss", by=by, window_s=10))
    run.flows(flow(5, 100, 50, daddr="2001:db8::3"))
    assert run.decide(10) == [(group, True, 0.5)]


def test_a_record_without_a_unit_is_in_no_group_of_units() -> None:
    run = Evaluation(AlertRule(name="loss", by="unit", window_s=10))
    run.flows(flow(5, 100, 50))
    assert run.decide(10) == []


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"host": ("web-*",)}, 0.5),
        ({"host": ("db-*", "web-[2-9]")}, None),
        ({"peer": ("192.0.2.0/24",)}, 0.5),
        ({"peer": ("::ffff:192.0.2.0/120",)}, 0.5),
        ({"peer": ("2001:db8::/32", "10.0.0.0/8")}, None),
        ({"port": (443,)}, 0.5),
        ({"port": ("39999-40000",)}, 0.5),
        ({"port": ("1-442", "444-39999")}, None),
        ({"unit": ("*",)}, None),
        ({"cause": ("rto",)}, 0.2),
        ({"cause": ("tlp",)}, None),
        ({"only_labels": {"env": "prod"}}, None),
    ],
)
def test_filters(filters: Any, expected: float | None) -> None:
    run = Evaluation(AlertRule(name="loss", window_s=10, **filters))
    run.flows(flow(5, 100, causes={"fast": 30, "rto": 20}))
    assert run.decide(10) == ([] if expected is None else [("web-1", True, expected)])


def test_a_rule_may_be_for_the_hosts_with_some_labels() -> None:
    run = Evaluation(AlertRule(name="loss", window_s=10, only_labels={"env": "prod", "dc": "a"}))
    labels = {"web-1": {"env": "prod", "dc": "a", "role": "web"}, "web-2": {"env": "prod", "dc": "b"}, "web-3": {}}
    made = values([flow(5, 100, 50, host=host) for host in labels], labels=labels)
    assert run.engine.put(FLOWS, made, (START_S + 1000) * S) is None
    assert run.decide(10) == [("web-1", True, 0.5)]


def test_a_ratio_of_data_leaves_out_acknowledgements_and_syns() -> None:
    run = Evaluation(AlertRule(name="loss", measure="data_ratio", window_s=10))
    run.flows(flow(5, 1000, data_segs=100, causes={"fast": 10, "syn": 90}))
    assert run.decide(10) == [("web-1", True, 0.1)]


def test_an_alert_lists_its_contributors() -> None:
    run = Evaluation(AlertRule(name="loss", by="port", window_s=10))
    run.flows(
        flow(5, 100, host="a", causes={"fast": 3, "rto": 9}),
        flow(5, 100, host="b", causes={"fast": 20}),
        flow(6, 100, host="b", cookie=8, sport=41_000, causes={"tlp": 1}),
    )
    (alert,) = run.alerts(10)
    assert (alert.causes, alert.hosts) == ("fast=23 rto=9 tlp=1", "b=21 a=12")
    assert alert.flows.split(", ")[0] == "b 10.0.0.1:40000>192.0.2.1:443=20"
