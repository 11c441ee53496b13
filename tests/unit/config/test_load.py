"""The configuration: every kind of value, what is refused and how it is said."""

import dataclasses
import re
import typing
from ipaddress import ip_address
from pathlib import Path

import pytest

from producer.config.load import (
    Alert,
    AlertRule,
    Capture,
    Config,
    Kafka,
    Kubernetes,
    Metrics,
    Registry,
    RuleConfig,
    Spool,
    Topics,
    load,
)
from producer.errors import ConfigError

FULL = """
host = "db-1"
state_dir = "/run/rebpf"
log_level = "debug"
reload_when_changed = true

[labels]
env = "prod"
rack = 7

[capture]
hooks = ["kprobe", "cgroup_skb"]
addresses = ["192.0.2.1", "2001:db8::1"]
ports = [443, 9092]
default = "drop"
transmit_ring_bytes = 65536
retransmit_ring_bytes = 8192
flow_ring_bytes = 16384
transmit = false
retransmit = true
flow = true
flow_interval_s = 30
pin = "/sys/fs/bpf/rebpf"
latency_s = 1
transmit_events_per_s = 1000
btf = "/some/vmlinux"
programs = "/some/programs"

[kafka]
brokers = "a:9092,b:9092"
topic_prefix = "dev."
stop_timeout_s = 2.5

[topics]
transmit = {"retention.ms" = 3600000}
retransmit = {"compression.type" = "lz4"}
flow = {}
heartbeat = {}

[kafka.settings]
"linger.ms" = 5
"socket.keepalive.enable" = false
"compression.codec" = "zstd"
"some.ratio" = 0.5

[spool]
transmit_bytes = 1048576
retransmit_bytes = 0
flow_bytes = 524288
max_age_s = 3600
quarantine_bytes = 262144
when_full = "drop_oldest"
spill_after_s = 0.5

[metrics]
listen = "[::1]:0"
web_config_file = "/etc/rebpf/web.yml"

[kubernetes]
pods_url = "https://api/api/v1/pods"
token = "/run/token"
ca = "/run/ca.crt"

[registry]
url = "http://registry:8081"
register = true
timeout_s = 3
auth = "registry-auth"
ca = "/etc/ca.pem"
certificate = "/etc/client.pem"
key = "/etc/client.key"

[alert]
group = "on-call"
lateness_s = 30
missed_heartbeats = 5
listen = ""
wait_s = 90
lookback_s = 40
webhook = "http://hook:80/x"
stdout = true
alertmanager = "http://alertmanager:9093"
repeat_s = 30

[[alert.rules]]
name = "much-loss"
by = "peer"
measure = "count"
window_s = 10
threshold = 500
clear = 100
minimum = 2
prefix = 16
prefix_v6 = 48
quantile = 0.5
for_s = 20
host = ["web-*"]
peer = ["10.0.0.0/8"]
cause = ["rto"]
only_labels = { env = "prod" }
severity = "page"
labels = { team = "net" }
annotations = { runbook = "https://example.com/r" }

[[rules]]
name = "all of it"
action = "drop"
transmit = "keep"
retransmit = "drop"
flow = "keep"
sample = 10
sample_by = "event"
sample_retransmits = true
address = ["10.0.0.0/8"]
local_address = ["@/etc/rebpf/mine"]
remote_address = ["2001:db8::/32"]
port = [443, "8000-8999"]
local_port = [1]
remote_port = ["2"]
netns = [4026531840, "blue"]
cgroup = ["/system.slice"]
unit = ["nginx.service"]
uid = [0, "www-data"]
interface = ["eth0", 2]
state = ["ESTABLISHED"]

[[rules]]
"""
RULE = RuleConfig(
    name="all of it",
    action="drop",
    transmit="keep",
    retransmit="drop",
    flow="keep",
    sample=10,
    sample_by="event",
    sample_retransmits=True,
    address=("10.0.0.0/8",),
    local_address=("@/etc/rebpf/mine",),
    remote_address=("2001:db8::/32",),
    port=(443, "8000-8999"),
    local_port=(1,),
    remote_port=("2",),
    netns=(4026531840, "blue"),
    cgroup=("/system.slice",),
    unit=("nginx.service",),
    uid=(0, "www-data"),
    interface=("eth0", 2),
    state=("ESTABLISHED",),
)


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> Config:
        path = tmp_path / "rebpf.toml"
        path.write_text(text)
        return load(path)

    return read


def test_every_setting_can_be_read(read):
    assert read(FULL) == Config(
        host="db-1",
        state_dir=Path("/run/rebpf"),
        log_level="debug",
        labels={"env": "prod", "rack": "7"},
        reload_when_changed=True,
        capture=Capture(
            hooks=("kprobe", "cgroup_skb"),
            addresses=(ip_address("192.0.2.1"), ip_address("2001:db8::1")),
            ports=(443, 9092),
            default="drop",
            transmit_ring_bytes=65536,
            retransmit_ring_bytes=8192,
            flow_ring_bytes=16384,
            transmit=False,
            flow_interval_s=30.0,
            pin=Path("/sys/fs/bpf/rebpf"),
            latency_s=1.0,
            transmit_events_per_s=1000,
            btf=Path("/some/vmlinux"),
            programs=Path("/some/programs"),
        ),
        kafka=Kafka(
            brokers="a:9092,b:9092",
            topic_prefix="dev.",
            settings={
                "linger.ms": "5",
                "socket.keepalive.enable": "false",
                "compression.codec": "zstd",
                "some.ratio": "0.5",
            },
            stop_timeout_s=2.5,
        ),
        topics=Topics(transmit={"retention.ms": "3600000"}, retransmit={"compression.type": "lz4"}),
        spool=Spool(
            transmit_bytes=1048576,
            retransmit_bytes=0,
            flow_bytes=524288,
            max_age_s=3600.0,
            quarantine_bytes=262144,
            when_full="drop_oldest",
            spill_after_s=0.5,
        ),
        metrics=Metrics(listen="[::1]:0", web_config_file=Path("/etc/rebpf/web.yml")),
        kubernetes=Kubernetes("https://api/api/v1/pods", Path("/run/token"), Path("/run/ca.crt")),
        registry=Registry(
            url="http://registry:8081",
            register=True,
            timeout_s=3.0,
            auth=Path("registry-auth"),
            ca=Path("/etc/ca.pem"),
            certificate=Path("/etc/client.pem"),
            key=Path("/etc/client.key"),
        ),
        alert=Alert(
            group="on-call",
            lateness_s=30.0,
            missed_heartbeats=5.0,
            listen="",
            wait_s=90.0,
            lookback_s=40.0,
            webhook="http://hook:80/x",
            stdout=True,
            alertmanager="http://alertmanager:9093",
            repeat_s=30.0,
            rules=(
                AlertRule(
                    name="much-loss",
                    by="peer",
                    measure="count",
                    window_s=10.0,
                    threshold=500.0,
                    clear=100.0,
                    minimum=2,
                    prefix=16,
                    prefix_v6=48,
                    quantile=0.5,
                    for_s=20.0,
                    host=("web-*",),
                    peer=("10.0.0.0/8",),
                    cause=("rto",),
                    only_labels={"env": "prod"},
                    severity="page",
                    labels={"team": "net"},
                    annotations={"runbook": "https://example.com/r"},
                ),
            ),
        ),
        rules=(RULE, RuleConfig()),
    )


def test_the_file_above_names_every_setting():
    def names(kind: type) -> set[str]:
        found = set()
        for field, hint in typing.get_type_hints(kind).items():
            inner = next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)
            found |= {field} if inner is None else names(inner)
        return found

    assert names(Config) - {"settings"} == set(re.findall(r"^(\w+) = ", FULL, re.MULTILINE)) - {"env", "rack"}


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
        ('labels.job = "a"', r"labels: expected another name than 'job', which Prometheus reserves"),
        (f'labels.env = "{"é" * 65}"', r"labels\.env: expected at most 64 characters, found 65"),
        ("labels.env = [1]", r"labels\.env: expected a string, a number or a boolean, found \[1\]"),
        ("[labels]\n" + "".join(f"a{i} = 1\n" for i in range(17)), r"labels: expected at most 16 labels, found 17"),
        ("topics.flows = {}", r"unknown key topics\.flows: did you mean flow\?"),
        ('topics.flow = {"retention ms" = 1}', r"topics\.flow: expected the name of a setting of Kafka's topics"),
        ('topics.flow."retention.ms" = ""', r"topics\.flow\.retention\.ms: expected a name"),
        ('kafka.topic_prefix = "a b"', r"kafka\.topic_prefix: expected letters"),
        ("kafka.settings.x = [1]", r"kafka\.settings\.x: expected a string, a number or a boolean, found \[1\]"),
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
def test_what_is_wrong_is_named(read, tmp_path, text, message):
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


@pytest.mark.parametrize("content", [b"", b"\n", b"s3cr\xff\n"])
def test_a_secret_that_cannot_be_is_not_shown(read, tmp_path, content):
    (tmp_path / "pass").write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 2: kafka\.settings\.sasl\.password: .*/pass: ") as refusal:
        read(f'[kafka.settings]\n"sasl.password" = "@{tmp_path}/pass"')
    assert "s3cr" not in str(refusal.value)


def test_no_password_in_a_url_on_the_command_line_either():
    with pytest.raises(ConfigError, match=r"set registry\.auth to a file"):
        Config().with_values(registry__url="https://me:secret@registry:8081")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "loss/web"', r"name: expected letters, .* 'loss/web'"),
        ('name = "silent"', r"name: .* the built-in rule's name"),
        ('by = "hots"', r"by: expected one of host, peer, subnet, .* found 'hots'"),
        ('measure = "mean"', r"measure: expected one of ratio, .* found 'mean'"),
        ("window_s = 0.5", r"window_s: expected 1 to .* seconds, found 0\.5"),
        ("threshold = 1.5", r"threshold: expected above 0 and at most 1, found 1\.5"),
        ("clear = 0.1", r"clear: expected above 0 and at most the threshold, found 0\.1"),
        ("for_s = -1", r"for_s: expected 0 to .* seconds, found -1"),
        ("quantile = 1.0", r"quantile: expected above 0 and below 1, found 1\.0"),
        ("prefix = 33", r"prefix: expected 0 to 32, found 33"),
        ('peer = ["10.0.0.1/8"]', r"peer: .* has host bits set"),
        ("port = [70000]", r"port: expected a port or a range of ports, found 70000"),
        ('cause = ["retry"]', r"cause: expected other, rto, .* found 'retry'"),
        ('labels = { "a-b" = "c" }', r"labels: expected letters, digits and underscores, found 'a-b'"),
        ("minimum = -1", r"minimum: expected at least 0, found -1"),
    ],
)
def test_an_alert_rule_that_makes_no_sense_is_named_with_its_line(read, text, message):
    key = text.partition(" ")[0]
    own = "" if key == "name" else 'name = "own"\n'
    line = 5 if key == "name" else 6
    with pytest.raises(ConfigError, match=rf"line {line}: alert\.rules\[2\]\.{message}"):
        read(f'[[alert.rules]]\nname = "first"\n\n[[alert.rules]]\n{own}{text}\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('group = ""', "expected a name"),
        ("lateness_s = -1", "expected 0 to .* seconds"),
        ("repeat_s = 0", "expected 1 to .* seconds"),
        ("missed_heartbeats = -1", "expected a number from 0"),
        ('alertmanager = "alertmanager:9093"', "expected a URL"),
        ('rules = [{name = "a"}, {name = "a"}]', "another rule a$"),
    ],
)
def test_an_alert_section_that_makes_no_sense_is_refused(read, text, message):
    with pytest.raises(ConfigError, match=rf"line [12]: alert\.{text.partition(' ')[0]}.*: .*{message}"):
        read(f"[alert]\n{text}\n")


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
