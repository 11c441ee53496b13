"""The configuration: every kind of value, what is refused and how it is said."""

from pathlib import Path

import pytest

from producer.config.load import (
    Config,
    load,
)
from producer.errors import ConfigError

from .test_every_setting import FULL


def test_without_a_file_and_in_an_empty_one_all_settings_have_their_defaults(read):
    assert read("") == load(None) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('hots = "a"', r"unknown key hots: did you mean host\?"),
        ("[capture]\nport = [1]", r"unknown key capture\.port: did you mean ports\?"),
        ("[kafka]\nzzz = 1", r"unknown key kafka\.zzz$"),
        ("[kafk]", r"unknown key kafk: did you mean kafka\?"),
        ("host = 7", r"host: expected a string, found 7"),
        ("state_dir = 7", r"state_dir: expected a path in quotes, found 7"),
        ('kafka = "a:1"', r"kafka: expected a table, \[kafka\], found 'a:1'"),
        ("capture.ports = 7", r"capture\.ports: expected a list, found 7"),
        ('capture.ports = ["7"]', r"capture\.ports: expected an integer, found '7'"),
        ("capture.ports = [true]", r"capture\.ports: expected an integer, found True"),
        ("capture.ports = [0]", r"capture\.ports: expected a port from 1 to 65535, found 0"),
        ("capture.ports = [65536]", r"capture\.ports: expected a port from 1 to 65535, found 65536"),
        ('capture.addresses = ["1.2.3"]', r"capture\.addresses: '1\.2\.3' does not appear to be"),
        ("capture.addresses = [1]", r"capture\.addresses: expected an address in quotes, found 1"),
        (
            "capture.transmit_ring_bytes = 12288",
            r"capture\.transmit_ring_bytes: expected a power of two .*, found 12288",
        ),
        (
            "capture.retransmit_ring_bytes = 2048",
            r"capture\.retransmit_ring_bytes: expected a power of two .*, found 2048",
        ),
        (
            "capture.retransmit_ring_bytes = -4096",
            r"capture\.retransmit_ring_bytes: expected a power of two .*, found -4096",
        ),
        ('capture.hooks = ["fentri"]', r"capture\.hooks: unknown hook fentri: did you mean fentry\?"),
        (
            "capture.transmit = false\ncapture.retransmit = false\ncapture.flow = false",
            r"capture: expected transmit, retransmit or flow to be true, found none of them",
        ),
        ("capture.flow_interval_s = 0.5", r"capture\.flow_interval_s: expected 1 to 3600 seconds, found 0\.5"),
        ('capture.latency_s = "1"', r"capture\.latency_s: expected a number, found '1'"),
        ("capture.transmit_events_per_s = -1", r"transmit_events_per_s: expected 0 to 1000000000, found -1"),
        ("capture.latency_s = 0", r"capture\.latency_s: expected 0\.02 to 60 seconds, found 0\.0"),
        ("kafka.stop_timeout_s = -1", r"kafka\.stop_timeout_s: expected 0 to 86400 seconds, found -1\.0"),
        ("registry.timeout_s = nan", r"registry\.timeout_s: expected .* seconds, found nan"),
        ("registry.timeout_s = inf", r"registry\.timeout_s: expected .* seconds, found inf"),
        ("registry.register = 1", r"registry\.register: expected true or false, found 1"),
        ('kafka.brokers = " "', r"kafka\.brokers: expected HOST:PORT"),
        ('labels.Env = "prod"', r"labels: expected a name of at most 32 lower-case letters, .*, found 'Env'"),
        ('labels.job = "a"', r"labels: expected a name other than 'job', which Prometheus reserves"),
        (f'labels.env = "{"é" * 65}"', r"labels\.env: expected at most 64 characters, found 65"),
        ("labels.env = [1]", r"labels\.env: expected a string, a number or a boolean, found a list or a time"),
        ("[labels]\n" + "".join(f"a{i} = 1\n" for i in range(17)), r"labels: expected at most 16 labels, found 17"),
        ("topics.flows = {}", r"unknown key topics\.flows: did you mean flow\?"),
        ('topics.flow = {"retention ms" = 1}', r"topics\.flow: expected the name of a Kafka topic setting"),
        ('topics.flow."retention.ms" = ""', r"topics\.flow\.retention\.ms: expected a name"),
        ('kafka.topic_prefix = "a b"', r"kafka\.topic_prefix: expected letters"),
        ("kafka.settings.x = [1]", r"kafka\.settings\.x: expected a string, a number or a boolean, found a list"),
        ("kafka.settings.sasl.password = 'x'", r"settings\.sasl: .* found a table: put a name with dots in quotes$"),
        ("kafka.settings = 1", r"kafka\.settings: expected a table, \[kafka\.settings\], found 1"),
        ("spool.transmit_bytes = 262143", r"spool\.transmit_bytes: expected 0, or at least 262144 bytes, found 262143"),
        ("spool.retransmit_bytes = 1", r"spool\.retransmit_bytes: expected 0, or at least 262144 bytes, found 1"),
        ("spool.quarantine_bytes = -1", r"spool\.quarantine_bytes: expected 0, or at least 262144 bytes, found -1"),
        ("spool.max_age_s = 0.5", r"spool\.max_age_s: expected 1 to .* seconds, found 0\.5"),
        ("spool.spill_after_s = 0", r"spool\.spill_after_s: expected 0\.1 to 3600 seconds, found 0\.0"),
        ('kafka.key = "port"', r"kafka\.key: expected host or flow, found 'port'"),
        ('spool.when_full = "both"', r"spool\.when_full: expected reject or drop_oldest, found 'both'"),
        ('metrics.listen = "9465"', r"metrics\.listen: expected HOST:PORT, found '9465'"),
        ('registry.url = "http://me:secret@a:1"', r"registry\.url: expected no user or password"),
        (
            '[kafka.settings]\n"sasl.password" = "@/none"',
            r"line 2: kafka\.settings\.sasl\.password: /none: No such file",
        ),
        ('[kafka.settings]\n"sasl.password" = "@pass"', r"line 2: .*: no systemd credential pass"),
        ("host = ", r"Invalid value"),
    ],
)
def test_wrong_settings_are_named(read, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        read(text)
    assert str(refusal.value).startswith(f"{tmp_path}/rebpf.toml: ")


@pytest.mark.parametrize("name", ["sasl.password", "ssl.key.password"])
def test_a_secret_is_read_from_a_file_or_from_systemd(read, tmp_path, monkeypatch, name):
    (tmp_path / "broker-pass").write_text("s3cret\nmore\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for place in (tmp_path / "broker-pass", "broker-pass"):
        config = read(f'[kafka.settings]\n"{name}" = "@{place}"\n"client.id" = "@x"\n')
        assert config.kafka.settings == {name: "s3cret", "client.id": "@x"}, "only secrets are read"
        assert "s3cret" not in repr(config)


@pytest.mark.parametrize("name", ["alert.webhook", "alert.alertmanager", "kubernetes.pods_url", "registry.url"])
@pytest.mark.parametrize("port", ["", ":1", ":x", ":1/a@b"])
def test_a_password_in_a_url_is_refused_and_not_shown(read, name, port):
    with pytest.raises(ConfigError, match=rf"{name}: expected no user or password in the URL") as refusal:
        read(f'{name} = "http://me:s3cret@a{port}"')
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize("name", ["alert.webhook", "kubernetes.pods_url"])
def test_an_at_sign_in_the_path_of_a_url_is_no_password(read, name):
    read(f'{name} = "http://a:1/b@c"')


@pytest.mark.parametrize("content", [b"", b"\n", b"s3cr\xff\n"])
def test_an_invalid_secret_is_not_shown(read, tmp_path, content):
    (tmp_path / "pass").write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 2: kafka\.settings\.sasl\.password: .*/pass: ") as refusal:
        read(f'[kafka.settings]\n"sasl.password" = "@{tmp_path}/pass"')
    assert "s3cr" not in str(refusal.value)


def test_no_password_in_a_url_on_the_command_line_either():
    with pytest.raises(ConfigError, match=r"set registry\.auth to a file"):
        Config().with_values(registry__url="https://me:secret@registry:8081")


@pytest.mark.parametrize("text", ['metrics.listen = ""', "spool.transmit_bytes = 0", "spool.quarantine_bytes = 0"])
def test_parts_can_be_switched_off(read, text):
    assert read(text) != Config()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load(tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "rebpf.toml"
    path.write_bytes(b'host = "\xff"')
    with pytest.raises(ConfigError, match=r"rebpf\.toml: "):
        load(path)


def test_values_are_laid_over_and_those_that_are_not_given_change_nothing(read):
    config = read(FULL)

    assert config.with_values(kafka__brokers=None, capture__ports=(), state_dir=None) == config
    changed = config.with_values(kafka__brokers="c:1", capture__ports=(5,), state_dir=Path("/s"))
    assert (changed.kafka.brokers, changed.capture.ports, changed.state_dir) == ("c:1", (5,), Path("/s"))
    assert changed.kafka.topic_prefix == "dev."
    assert changed.capture.hooks == ("kprobe", "cgroup_skb")


@pytest.mark.parametrize("where", ["host = {}", "[kafka]\nstop_timeout_s = {}", "[[rules]]\nuid = [1, {}]"])
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, str(1 << 63)], ids=["huge", "65 bits"])
def test_a_number_beyond_64_bits_is_refused_in_one_line(tmp_path: Path, where: str, number: str) -> None:
    path = tmp_path / "rebpf.toml"
    path.write_text(where.format(number))
    with pytest.raises(ConfigError, match="at most 64 bits") as caught:
        load(path)
    assert len(str(caught.value)) < 500
