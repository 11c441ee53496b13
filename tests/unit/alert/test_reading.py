"""What `rebpf alert` needs of its brokers."""

import logging

import pytest
from confluent_kafka import Consumer

from producer.alert.reading import topics_of
from producer.config.load import Config
from producer.errors import UnavailableError
from tests.support.mock_topics import Cluster


def test_the_test_broker_is_no_place_for_alerts() -> None:
    """Its topics cannot be created, so an advice to run `rebpf init` would lead nowhere."""
    cluster = Cluster()
    client = Consumer({"bootstrap.servers": cluster.brokers, "group.id": "alert"}, logger=logging.getLogger("alert"))
    with pytest.raises(UnavailableError, match=r"topic rebpf_agent does not exist.*in-process test broker"):
        topics_of(Config()).require(client)
    client.close()
    cluster.close()
