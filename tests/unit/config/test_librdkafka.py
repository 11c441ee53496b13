"""librdkafka's settings: which are rejected, which are passed on."""

import ctypes
import re
from pathlib import Path

import confluent_kafka
import pytest

from producer.config.librdkafka import (
    AT_DEFAULT,
    FRACTIONS,
    FREE_OF_CONSUMERS,
    FREE_OF_PRODUCERS,
    NUMBERS,
    REFUSED,
    REQUIRED,
    admin_settings,
    check_allowed,
    client_settings,
    consumer_settings,
)
from producer.config.load import load
from producer.errors import ConfigError
from producer.kafka.sink import KafkaSink
from tests.support.client_settings import FREE_OF_ALL


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, "1" if value != "1" else "2") for name, value in REQUIRED.items()]
    + [("request.required.acks", "1"), ("delivery.timeout.ms", "1000")],
)
def test_settings_that_delivery_rests_on_cannot_be_changed(name, value):
    with pytest.raises(ConfigError, match=rf"kafka\.settings\.{name}: must be .*: remove it"):
        client_settings("b:1", {name: value})


@pytest.mark.parametrize("name", ["sasl.mechanism", "sasl.mechanisms"])
def test_a_token_must_come_from_somewhere(name):
    """The library would wait for it, without a connection, an error or a line in its log."""
    with pytest.raises(ConfigError, match=rf'kafka\.settings\.{name}: OAUTHBEARER needs .*"oidc"'):
        client_settings("b:1", {name: "OAUTHBEARER"})
    for more in ({"sasl.oauthbearer.method": "OIDC"}, {"enable.sasl.oauthbearer.unsecure.jwt": "true"}):
        assert client_settings("b:1", {name: "OAUTHBEARER", **more})[name] == "OAUTHBEARER"


@pytest.mark.parametrize("brokers", ["b:1", None])
def test_brokers_are_set_in_their_own_place(brokers):
    with pytest.raises(ConfigError, match=r"bootstrap\.servers: must not be set, since kafka\.brokers sets it"):
        client_settings(brokers, {"bootstrap.servers": "other:1"})


def test_other_settings_are_passed_on_and_win_over_defaults():
    settings = client_settings("b:1", {"linger.ms": "7", "acks": "all", "socket.timeout.ms": "5"})

    assert (settings["linger.ms"], settings["socket.timeout.ms"]) == ("7", "5")
    assert settings["bootstrap.servers"] == "b:1"
    assert settings.items() >= REQUIRED.items()


@pytest.mark.parametrize(("name", "value"), [("lingr.ms", "5"), ("linger.ms", "-1"), ("max.in.flight", "6")])
def test_a_setting_that_librdkafka_rejects_is_a_configuration_error(name, value):
    sink = KafkaSink(client_settings("b:1", {name: value}), {})
    with pytest.raises(ConfigError, match=r"^kafka\.settings"):
        sink.open()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"reconnect.backoff.ms": "50"}, "50"), ({"reconnect.backoff.max.ms": "500"}, None)],
)
def test_the_client_waits_before_it_reconnects_unless_the_user_says_otherwise(given, expected):
    settings = client_settings("127.0.0.1:1", given)
    assert settings.get("reconnect.backoff.ms") == expected
    sink = KafkaSink(settings, {})
    sink.open()  # the library accepts them together
    sink.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1"),
        ({"compression.type": "zstd"}, "1"),
        ({"compression.level": "6"}, "6"),
        ({"compression.codec": "lz4"}, None),
        ({"compression.type": "gzip"}, None),
    ],
)
def test_the_level_of_zstd_is_1_and_other_codecs_have_theirs(given, expected):
    assert client_settings("127.0.0.1:1", given).get("compression.level") == expected


def listed(path: Path) -> dict[str, str]:
    """Return all settings of the installed librdkafka with their scope, C, P or *, and their type."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        library = ctypes.CDLL(next(line.split(maxsplit=5)[5].strip() for line in maps if "librdkafka" in line))
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(str(path).encode(), b"w"))
    library.rd_kafka_conf_properties_show(file)
    libc.fclose(file)
    rows = re.findall(r"^([a-z][\w.]+) +\| +([CP*]) +\|.*\*Type: ([\w ]+)\*$", path.read_text(), re.MULTILINE)
    return {name: (scope, kind) for name, scope, kind in rows}


def test_each_setting_of_the_installed_library_is_decided(tmp_path):
    settings = listed(tmp_path / "settings")
    classes = [{*REQUIRED, *AT_DEFAULT}, set(REFUSED), FREE_OF_ALL, FREE_OF_PRODUCERS, FREE_OF_CONSUMERS]
    aliases = {"request.required.acks", "delivery.timeout.ms", "retries"}
    undecided = settings.keys() - set().union(*classes) - aliases

    assert len(settings) > 150
    assert not undecided, (
        f"librdkafka {confluent_kafka.libversion()[0]} has settings that config/librdkafka.py does not know: "
        f"decide whether each is required, refused or free: {sorted(undecided)}"
    )
    assert sum(map(len, classes)) == len(set().union(*classes)), "each is in one class"
    for names, scope in ((FREE_OF_PRODUCERS, "P"), (FREE_OF_CONSUMERS, "C"), (FREE_OF_ALL, "*")):
        assert {settings[name][0] for name in names & settings.keys()} == {scope}


def test_each_number_of_the_installed_library_is_known(tmp_path):
    settings = listed(tmp_path / "settings")
    free = (FREE_OF_PRODUCERS | FREE_OF_CONSUMERS | FREE_OF_ALL) & settings.keys()
    assert {name for name in free if settings[name][1] == "float"} == FRACTIONS
    assert {name for name in free if NUMBERS.fullmatch(name)} - FRACTIONS == {
        name for name in free if settings[name][1] == "integer"
    }


@pytest.mark.parametrize("value", ["5s", "5000 ms", "0x10", "010", "1_000", "1e3", "nan", "inf", " 5", "5 ", "", "+5"])
@pytest.mark.parametrize("name", ["linger.ms", "socket.timeout.ms", "batch.size", "connections.max.idle.ms"])
def test_a_number_that_the_library_would_cut_is_refused(name, value):
    """librdkafka ignores what comes after the digits: with socket.timeout.ms = "60s", no request would be answered."""
    with pytest.raises(ConfigError, match=rf"kafka.settings.{name}: expected a .*number without a unit, found "):
        check_allowed({name: value})


@pytest.mark.parametrize(("name", "value"), [("linger.ms", "0.5"), ("compression.level", "-1"), ("client.id", "5s")])
def test_a_number_that_the_library_reads_whole_is_accepted(name, value):
    check_allowed({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delivery.report.only.error", "true"),
        ("enable.gapless.guarantee", "true"),
        ("retries", "0"),
        ("queuing.strategy", "lifo"),
        ("api.version.request", "false"),
        ("api.version.fallback.ms", "60000"),
        ("transactional.id", "x"),
        ("plugin.library.paths", "x.so"),
        ("ssl.engine.location", "x.so"),
        ("sasl.kerberos.kinit.cmd", "sh -c true"),
        ("test.mock.num.brokers", "1"),
        ("group.id", "x"),
        ("enable.auto.commit", "true"),
        ("log.queue", "false"),
        ("enabled_events", "0"),
        ("log_cb", "x"),
        ("acks", "1"),
    ],
)
def test_settings_that_would_break_delivery_order_or_identity_are_refused_when_read(tmp_path, name, value):
    path = tmp_path / "rebpf.toml"
    path.write_text(f'[kafka.settings]\n"{name}" = "{value}"\n')
    with pytest.raises(ConfigError, match=rf"line 2: kafka\.settings\.{re.escape(name)}: .*: remove it"):
        load(path)


def test_the_value_that_is_required_may_be_said_and_each_client_gets_what_is_for_it():
    said = {**AT_DEFAULT, "acks": "all", "linger.ms": "7", "fetch.max.bytes": "1000000", "security.protocol": "ssl"}

    found = consumer_settings("b:1", said)
    assert (
        found.items() >= {"fetch.max.bytes": "1000000", "security.protocol": "ssl", "bootstrap.servers": "b:1"}.items()
    )
    assert not found.keys() & said.keys() - {"fetch.max.bytes", "security.protocol"}
    ours = {"allow.auto.create.topics": "false", "bootstrap.servers": "b:1"}
    assert admin_settings("b:1", said) == {"security.protocol": "ssl", **ours}
    produced = client_settings("b:1", said)
    assert produced["linger.ms"] == "7"
    assert not produced.keys() & {"fetch.max.bytes", *AT_DEFAULT}
