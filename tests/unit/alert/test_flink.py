"""The Flink job: what SQL cannot express is refused. tests/integration/test_alert_flink.py runs it."""

from typing import Any

import pytest

from producer.alert.flink import job
from producer.config.load import Alert, AlertRule, Config, Kafka, Registry
from producer.errors import ConfigError


def config(**rule: Any) -> Config:
    alert = Alert(rules=(AlertRule(**{"name": "one", **rule}),))
    return Config(kafka=Kafka(brokers="k:9092"), registry=Registry("http://r:8081"), alert=alert)


@pytest.mark.parametrize("rule", [{"by": "subnet"}, {"peer": ("2001:db8::/32",)}])
def test_a_rule_with_networks_that_sql_lacks_is_refused_by_name(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"alert\.rules: one: Flink SQL has no"):
        job(config(**rule), 0)


@pytest.mark.parametrize("missing", [{"kafka": Kafka()}, {"registry": Registry(None)}, {"alert": Alert()}])
def test_rules_brokers_and_a_registry_are_needed(missing: dict[str, Any]) -> None:
    parts = {"kafka": Kafka(brokers="k:9092"), "registry": Registry("http://r:8081"), **missing}
    with pytest.raises(ConfigError, match="needs rules, brokers and a registry"):
        job(Config(**{"alert": config().alert, **parts}), 0)


@pytest.mark.parametrize(("window_s", "for_s", "days"), [(60.0, 0.0, 1), (43_200.0, 43_201.0, 3), (86_400.0, 0.0, 2)])
def test_state_outlives_the_longest_windows(window_s: float, for_s: float, days: int) -> None:
    assert f"'table.exec.state.ttl' = '{days} d'" in job(config(window_s=window_s, for_s=for_s), 0)


def test_only_the_topics_of_the_rules_are_read_from_a_time_and_quotes_are_doubled() -> None:
    text = job(config(measure="count", unit=("a'b*",), only_labels={"env": "it's"}), 1_800_000_000_123_000_000)
    assert "'topic' = 'tcp_retransmit'" in text
    assert "tcp_flow'" not in text
    assert "'scan.startup.timestamp-millis' = '1800000000123'" in text
    assert "labels['env'] = 'it''s'" in text
    assert "a''b" in text
