"""A member of the consumer group, on a mock cluster."""

import logging
import re
import threading
from contextlib import closing
from dataclasses import replace

import pytest
from confluent_kafka import KafkaError

from producer.alert import member
from producer.alert.member import Member
from producer.config.alerts import AlertRule
from producer.config.load import Config, Kafka
from tests.support.mock_cluster import JOIN_GROUP, Cluster


class Rights:
    """In place of the admin client, which the mock cluster does not answer."""

    def __init__(self, config: Config) -> None: ...

    def require_write(self, name: str) -> None: ...


@pytest.mark.slow
def test_a_group_of_another_program_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """librdkafka tries to join for ever, so this member would be a standby without a word."""
    monkeypatch.setattr(member, "Admin", Rights)
    stop = threading.Event()

    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "set alert.group" in record.getMessage():
                stop.set()

    with closing(Cluster()) as cluster:
        for topic in ("tcp_flow", "tcp_alerts"):
            cluster.create(topic)
        cluster.answer_with(JOIN_GROUP, *[KafkaError.INCONSISTENT_GROUP_PROTOCOL] * 100)
        config = Config(kafka=Kafka(brokers=cluster.brokers))
        config = replace(config, alert=replace(config.alert, rules=(AlertRule(name="loss"),), missed_heartbeats=0))
        handler = Stop()
        member.logger.addHandler(handler)
        try:
            Member(config, cluster.brokers, lambda wait: [], stop, from_beginning=False).run(60)
        finally:
            member.logger.removeHandler(handler)
    named = r"WARNING .* group rebpf-alert: .* error=INCONSISTENT_GROUP_PROTOCOL \(another program has this group"
    assert re.search(named, caplog.text)
