"""The simulated hosts of tests/bench/simulation.py deliver, and what they do to a broker is counted."""

import pytest

from producer.commands.init import create_topics
from producer.config.load import Config
from tests.bench.hosts import host_name
from tests.bench.observed import Observed
from tests.bench.simulated_fleet import Fleet
from tests.support.servers.consume import kcat_messages

pytestmark = [pytest.mark.real_kafka, pytest.mark.extended]

HOSTS = 5
PREFIX = "simulation."


def test_simulated_hosts_deliver_and_what_they_do_to_a_broker_is_counted(kafka):
    create_topics(Config().with_values(kafka__brokers=kafka.bootstrap, kafka__topic_prefix=PREFIX), 6, 1)
    seen = Observed([kafka])
    seen.begin()
    (others,) = seen.connections()

    with Fleet(kafka.bootstrap, HOSTS, prefix=PREFIX) as fleet:
        fleet.go()
        report = fleet.deliver_first()
        (connections,) = seen.connections()
    (work,) = seen.work()

    assert len(report.first_s) == HOSTS
    assert connections - others == HOSTS
    assert len(fleet.opened_s) >= HOSTS
    names = {host_name(number).encode() for number in range(HOSTS)}
    for topic in ("tcp_transmit", "rebpf_agent"):
        assert {message.key for message in kcat_messages(kafka.bootstrap, PREFIX + topic)} == names
    # A host's first delivery is of transmits; its heartbeat was sent before.
    assert work.requests["Produce"] >= 2 * HOSTS
    assert work.requests["InitProducerId"] >= HOSTS
    assert work.cpu_s > 0
