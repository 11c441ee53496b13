"""Each setting has its range and form, whatever it came from; files that are none are refused."""

import json
import os
from ipaddress import ip_address
from pathlib import Path

import pytest

from producer.config.load import Config, load
from producer.errors import ConfigError
from tests.support.rebpf import rebpf

RULE = "[[rules]]\n"
HUGE = "0x" + "f" * 5000


def read(folder: Path, text: str | bytes) -> Config:
    path = folder / "rebpf.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path)


@pytest.mark.parametrize(
    "text",
    [
        'host = ""',
        'host = "a\\u0000b"',
        'host = "a\\u001b[2Jb"',
        f'host = "{"x" * 10_000_000}"',
        'state_dir = ""',
        'state_dir = "state"',
        'state_dir = "/a\\u0000b"',
        f'state_dir = "/{"a" * 256}"',
        f'capture.pin = "/sys/fs/bpf/{"ä" * 128}"',
        'labels.env = ""',
        'labels.env = "a\\u0000b"',
        'labels.__name__ = "a"',
        'labels."a-b" = "a"',
        f'labels.{"a" * 33} = "a"',
        'capture.default = "foo"',
        "capture.hooks = []",
        "capture.transmit_ring_bytes = 2147483648",
        f"capture.transmit_ring_bytes = {HUGE}",
        "capture.transmit_ring_bytes = " + "9" * 5000,
        f"capture.latency_s = {HUGE}",
        "capture.latency_s = 1e300",
        'capture.pin = "pins"',
        'capture.addresses = ["fe80::1%eth0"]',
        'kafka.brokers = ""',
        'kafka.brokers = ","',
        'kafka.brokers = "a:1,,b:1"',
        'kafka.brokers = "a:99999"',
        'kafka.brokers = "a:0"',
        'kafka.brokers = "a b:1"',
        'kafka.brokers = "a\\u0000:1"',
        f'kafka.topic_prefix = "{"x" * 240}"',
        "kafka.stop_timeout_s = 1e300",
        '[kafka.settings]\n"client.id" = "a\\u0000b"',
        '[kafka.settings]\n"client.id\\u0000x" = "a"',
        f'[kafka.settings]\n"linger.ms" = {HUGE}',
        "spool.max_age_s = 1e300",
        "spool.transmit_bytes = 9223372036854775807",
        'metrics.listen = "127.0.0.1:99999"',
        'metrics.listen = "a..b:1"',
        f'metrics.listen = "{"a" * 64}:1"',
        'metrics.listen = "a\\u0000b:1"',
        'metrics.listen = "[::1:1"',
        'registry.url = ""',
        'registry.url = "http://"',
        'registry.url = "http://["',
        'registry.url = "http://a:99999"',
        'registry.url = "http://a:0"',
        'registry.url = "http://a/b c"',
        'registry.url = "http://a/é"',
        'registry.url = "http://a..b:1"',
        'registry.url = "file:///etc/passwd"',
        'registry.auth = "a\\u0000b"',
        'registry.key = "/x"',
        "registry.timeout_s = 1e300",
        'alert.alertmanager = "http://a:x"',
        'alert.group = "a\\nb"',
        "alert.missed_heartbeats = 1e300",
        "alert.lateness_s = 1e300",
        RULE + "uid = [-1]",
        RULE + "uid = [1099511627776]",
        RULE + "uid = [4294967295]",
        RULE + "uid = [true]",
        RULE + "uid = [1.0]",
        RULE + 'uid = [""]',
        RULE + "netns = [-1]",
        RULE + "netns = [0]",
        RULE + 'netns = ["../x"]',
        RULE + "interface = [8589934592]",
        RULE + "sample = 1099511627776",
        RULE + "sample = 0",
        RULE + "sample = 1.5",
        RULE + "sample = 2020-01-01",
        RULE + 'sample_by = "host"',
        RULE + 'unit = [""]',
        RULE + 'unit = ["/etc"]',
        RULE + 'unit = [".."]',
        RULE + 'cgroup = ["../.."]',
        RULE + 'cgroup = ["a\\u0000b"]',
        RULE + 'address = ["fe80::1%eth0"]',
        RULE + 'address = ["@"]',
        RULE + 'address = ["@/a\\u0000b"]',
        RULE + "port = [-1]",
        RULE + 'port = ["1-70000"]',
        RULE + 'port = ["90-80"]',
        RULE + 'port = ["http"]',
        RULE + 'port = ["\u0661"]',
        RULE + 'name = "a\\nINFO ready"',
        RULE + 'action = "reject"',
        RULE + 'state = [""]',
        RULE + 'state = ["OPEN"]',
        "host = 1\nhost = 2",
        '"\\u001b[2J" = 1',
        "x = " + "[" * 5000,
        b'host = "caf\xe9"',
        b"\x00",
    ],
)
def test_malformed_and_out_of_range_values_are_refused_in_one_line(tmp_path, text):
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, text)
    assert str(refusal.value).startswith(f"{tmp_path}/rebpf.toml: ")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize("text", [b'\xef\xbb\xbfhost = "a"', b'host = "a"\r\n\r\n[kafka]\r\n', 'host = "a" # \u2028'])
def test_editors_marks_and_line_ends_do_no_harm(tmp_path, text):
    assert read(tmp_path, text).host == "a"


def test_a_file_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 30)
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "large", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(ConfigError):
            load(path)
    with pytest.raises(ConfigError, match=r"sasl\.password: .*/fifo: expected a regular file"):
        read(tmp_path, f'[kafka.settings]\n"sasl.password" = "@{tmp_path}/fifo"')


@pytest.mark.parametrize(
    ("setting", "value", "source"),
    [
        ("kafka__brokers", "", "--brokers or REBPF_BROKERS: kafka.brokers"),
        ("kafka__brokers", "a\0b:1", "--brokers or REBPF_BROKERS: kafka.brokers"),
        ("registry__url", "ftp://a", "--registry or REBPF_REGISTRY: registry.url"),
        ("capture__addresses", (ip_address("fe80::1%eth0"),), "--address or REBPF_ADDRESS: capture.addresses"),
        ("capture__ports", (0,), "--port or REBPF_PORT: capture.ports"),
        ("state_dir", Path("/a\0b"), "--state-dir or REBPF_STATE_DIR: state_dir"),
    ],
)
def test_an_option_is_checked_as_the_file_is_and_named(setting, value, source):
    with pytest.raises(ConfigError) as refusal:
        Config().with_values(**{setting: value})
    assert str(refusal.value).startswith(f"{source}: ")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("name", ["linger.ms", "queue.buffering.max.ms"])
@pytest.mark.parametrize(
    ("linger", "spill", "refused"),
    [("2000", 2, True), ("900000", 60, True), ("1999.5", 2, False), ("2000", 2.5, False), ("100", 0.1, True)],
)
def test_a_client_that_waits_until_events_go_to_disk_is_refused(tmp_path, name, linger, spill, refused):
    text = f'spool.spill_after_s = {spill}\n[kafka.settings]\n"{name}" = {linger}\n'
    if not refused:
        assert read(tmp_path, text)
        return
    with pytest.raises(ConfigError, match=rf"line 3: kafka.settings.{name}: expected less than spool.spill_after_s, "):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("connections.max.idle.ms", "1", True),
        ("connections.max.idle.ms", "999", True),
        ("connections.max.idle.ms", "0", False),
        ("connections.max.idle.ms", "1000", False),
        ("metadata.recovery.rebootstrap.trigger.ms", "0", True),
        ("metadata.recovery.rebootstrap.trigger.ms", "300000", False),
        ("socket.timeout.ms", "10", True),
        ("socket.timeout.ms", "1000", False),
        ("topic.metadata.refresh.interval.ms", "1", True),
        ("topic.metadata.refresh.interval.ms", "10", True),
        ("topic.metadata.refresh.interval.ms", "0", False),
        ("topic.metadata.refresh.interval.ms", "-1", False),
    ],
)
def test_a_client_that_gets_no_answer_from_a_slow_broker_is_refused(tmp_path, name, value, refused):
    """Tried with each setting of librdkafka at its limits, and a broker 500 ms away: nothing is delivered."""
    text = f'kafka.settings."{name}" = {value}'
    if not refused:
        assert read(tmp_path, text)
        return
    expected = "expected (-1 or )?(0 or )?at least 1000"
    with pytest.raises(ConfigError, match=rf"kafka.settings.{name}: {expected}, found {value}"):
        read(tmp_path, text)


@pytest.mark.parametrize("command", [("run",), ("check", "--local"), ("init",)])
def test_empty_brokers_never_mean_the_test_broker(tmp_path, command):
    path = tmp_path / "rebpf.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\nkafka.brokers = "a:1"\n')
    by_option = rebpf(*command, "--config", path, "--brokers", "")
    by_variable = rebpf(*command, "--config", path, env={"REBPF_BROKERS": ""})

    assert (by_option.returncode, by_variable.returncode) == (78, 64)
    assert by_option.stderr.startswith("rebpf: --brokers or REBPF_BROKERS: kafka.brokers: ")
    assert by_variable.stderr == "rebpf: REBPF_BROKERS is set but empty: give it a value, or unset it\n"


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize(
    "name",
    [
        "state_dir",
        "capture.pin",
        "capture.btf",
        "capture.programs",
        "metrics.web_config_file",
        "registry.auth",
        "registry.ca",
        "registry.certificate",
        "registry.key",
        "kubernetes.token",
        "kubernetes.ca",
    ],
)
def test_an_empty_path_in_a_file_is_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected a path, found '{value}'"):
        read(tmp_path, f'{name} = "{value}"')


def test_a_blank_variable_is_not_taken_for_none():
    """All connections would be captured instead of those of a port."""
    done = rebpf("config", env={"REBPF_PORT": " "})
    assert (done.returncode, done.stderr) == (64, "rebpf: REBPF_PORT is set but empty: give it a value, or unset it\n")


@pytest.mark.parametrize("value", ["tcp://10.96.0.5:9465", "udp://[fd00::5]:9465"])
def test_the_address_of_a_service_named_rebpf_is_no_port(value):
    """Kubernetes and Docker set REBPF_PORT in the containers beside it."""
    done = rebpf("config", "--json", env={"REBPF_PORT": value})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["settings"]["capture.ports"] == []
    assert rebpf("config", env={"REBPF_PORT": value.partition("//")[2]}).returncode == 64
