"""A file with every setting, read."""

import dataclasses
import re
import typing
from ipaddress import ip_address
from pathlib import Path

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
)

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
retransmit_at_once = false
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
            retransmit_at_once=False,
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
