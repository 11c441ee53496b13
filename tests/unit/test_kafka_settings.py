"""librdkafka's settings: what is refused, what is passed on."""

import pytest

from producer.errors import ConfigError
from producer.kafka import KafkaSink
from producer.kafka_settings import REQUIRED, client_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, "1" if value != "1" else "2") for name, value in REQUIRED.items()]
    + [("request.required.acks", "1"), ("delivery.timeout.ms", "1000")],
)
def test_settings_that_delivery_rests_on_cannot_be_changed(name, value):
    with pytest.raises(ConfigError, match=rf"kafka\.settings\.{name}: must be .*: remove it"):
        client_settings("b:1", {name: value})


@pytest.mark.parametrize("brokers", ["b:1", None])
def test_brokers_are_set_in_their_own_place(brokers):
    with pytest.raises(ConfigError, match=r"bootstrap\.servers: set kafka\.brokers instead"):
        client_settings(brokers, {"bootstrap.servers": "other:1"})


def test_other_settings_are_passed_on_and_win_over_defaults():
    settings = client_settings("b:1", {"linger.ms": "7", "acks": "all", "socket.timeout.ms": "5"})

    assert (settings["linger.ms"], settings["socket.timeout.ms"]) == ("7", "5")
    assert settings["bootstrap.servers"] == "b:1"
    assert settings.items() >= REQUIRED.items()


@pytest.mark.parametrize(("name", "value"), [("lingr.ms", "5"), ("linger.ms", "soon"), ("max.in.flight", "6")])
def test_a_setting_that_librdkafka_refuses_is_a_configuration_error(name, value):
    sink = KafkaSink(client_settings("b:1", {name: value}), {})
    with pytest.raises(ConfigError, match=r"kafka setting"):
        sink.open()
