"""`rebpf init` and `rebpf check` against real servers, and against none."""

import json

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource

from producer.kafka.admin import topic_settings
from tests.support.rebpf import as_nobody, findings, rebpf
from tests.support.servers.cluster import Broker
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import free_port

pytestmark = pytest.mark.real_kafka

TOPICS = ("tcp_transmit", "tcp_retransmit", "tcp_flow")
TOPIC_SETTINGS = {
    "cleanup.policy": "delete",
    "retention.ms": "604800000",
    "compression.type": "producer",
    "message.timestamp.type": "CreateTime",
}
KEPT_LONG = {**TOPIC_SETTINGS, "retention.ms": "2592000000", "compression.type": "zstd"}
SETTINGS_OF = {
    "tcp_transmit": {**TOPIC_SETTINGS, "retention.ms": "86400000"},
    "tcp_retransmit": KEPT_LONG,
    "tcp_flow": KEPT_LONG,
    "rebpf_agent": TOPIC_SETTINGS,
}


def test_init_creates_the_topics_and_leaves_those_that_are_there(kafka, config):
    arguments = ["init", "--config", config("init."), "--brokers", kafka.bootstrap]
    first = rebpf(*arguments, "--partitions", 5)
    again = rebpf(*arguments, "--partitions", 7)

    numbers = "init.tcp_transmit 1, init.tcp_retransmit 2, init.tcp_flow 5, init.rebpf_agent 3"
    ids = f"no registry: schema ids are {numbers}"
    all_topics = [*TOPICS, "rebpf_agent"]
    assert (first.returncode, again.returncode) == (0, 0)
    said = {
        topic: "replication 1, " + " ".join(f"{name}={value}" for name, value in settings.items())
        for topic, settings in SETTINGS_OF.items()
    }
    created = [f"topic init.{topic}: created, 5 partitions, {said[topic]}" for topic in TOPICS]
    last = f"topic init.rebpf_agent: created, 1 partition, {said['rebpf_agent']}"
    assert first.stdout.splitlines() == [*created, last, ids]
    there = [f"topic init.{topic}: exists, unchanged" for topic in all_topics]
    assert again.stdout.splitlines() == [*there, ids]
    present = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics
    assert [len(present[f"init.{topic}"].partitions) for topic in all_topics] == [5, 5, 5, 1]
    for topic in all_topics:
        has = settings_of(kafka.bootstrap, f"init.{topic}")
        assert {name: has[name] for name in TOPIC_SETTINGS} == SETTINGS_OF[topic]


def test_init_takes_a_topics_settings_from_the_configuration(kafka, config):
    more = (
        '[topics]\ntransmit = {"retention.ms" = 3600000, "segment.ms" = 600000}\n'
        'retransmit = {"compression.type" = "lz4"}\nheartbeat = {"retention.bytes" = 1048576}\n'
    )
    done = rebpf("init", "--config", config("own.", more), "--brokers", kafka.bootstrap)

    assert done.returncode == 0, done.stderr
    transmit, retransmit, _, heartbeat = (
        settings_of(kafka.bootstrap, f"own.{topic}") for topic in (*TOPICS, "rebpf_agent")
    )
    assert (transmit["retention.ms"], transmit["segment.ms"]) == ("3600000", "600000")
    assert (retransmit["retention.ms"], retransmit["compression.type"]) == ("2592000000", "lz4")
    assert (heartbeat["retention.ms"], heartbeat["retention.bytes"]) == ("604800000", "1048576")


def test_init_says_which_setting_of_a_topic_kafka_rejects(kafka, config):
    more = '[topics]\ntransmit = {"retention.mss" = 1}\n'
    done = rebpf("init", "--config", config("wrong.", more), "--brokers", kafka.bootstrap)

    assert done.returncode == 69
    assert done.stderr.startswith("rebpf: cannot create topic wrong.tcp_transmit: ")
    assert "retention.mss" in done.stderr


def test_init_creates_what_alerts_need_if_asked_to(kafka, config):
    plain = rebpf("init", "--config", config("watch."), "--brokers", kafka.bootstrap)
    assert "tcp_alert" not in plain.stdout
    done = rebpf("init", "--config", config("watch."), "--brokers", kafka.bootstrap, "--alerts", "--partitions", 3)

    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines()[4:5]] == ["topic watch.tcp_alerts: created"]
    assert done.stdout.endswith("watch.rebpf_agent 3, watch.tcp_alerts 4\n")
    present = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics
    assert len(present["watch.tcp_alerts"].partitions) == 1
    alerts = settings_of(kafka.bootstrap, "watch.tcp_alerts")
    assert (alerts["cleanup.policy"], int(alerts["retention.ms"])) == ("compact,delete", 90 * 86_400_000)


def settings_of(bootstrap: str, topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    admin = AdminClient({"bootstrap.servers": bootstrap})
    found = admin.describe_configs([resource], request_timeout=30)[resource].result()
    return {name: entry.value for name, entry in found.items()}


@pytest.mark.parametrize(("replication", "spared"), [(1, None), (2, None), (3, "2"), (4, "3")])
def test_with_three_replicas_a_new_topic_takes_events_while_one_is_lost(replication, spared):
    assert topic_settings(replication).get("min.insync.replicas") == spared


def test_init_says_why_a_topic_cannot_be_created(kafka, config):
    done = rebpf("init", "--config", config("init-three."), "--brokers", kafka.bootstrap, "--replication", 3)

    assert done.returncode == 69
    assert done.stderr.startswith("rebpf: cannot create topic init-three.tcp_transmit: ")
    assert "replication factor" in done.stderr.lower()
    assert len(done.stderr.splitlines()) == 1


def test_init_without_brokers_is_a_usage_error():
    done = rebpf("init")

    assert (done.returncode, done.stderr) == (64, "rebpf: init needs --brokers\n")


def test_init_with_no_broker_there_says_so(config):
    brokers = f"127.0.0.1:{free_port()}"
    done = rebpf("init", "--config", config(""), "--brokers", brokers)

    assert done.returncode == 69
    assert done.stderr.startswith(f"rebpf: no response from Kafka at {brokers}: ")
    assert "Connection refused" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_names_missing_topics_and_finds_them_after_init(kafka, config):
    arguments = ["--config", config("check."), "--brokers", kafka.bootstrap]
    code, before = findings(*arguments)
    assert code == 69
    for topic in TOPICS:
        assert before[f"topic check.{topic}"] == {
            "subject": f"topic check.{topic}", "ok": False, "warning": False, "exit_code": 69,
            "text": "missing: run `rebpf init`",
        }  # fmt: skip
    assert before["Kafka"]["ok"]

    assert rebpf("init", *arguments).returncode == 0
    _, after = findings(*arguments)
    assert [after[f"topic check.{topic}"]["text"] for topic in TOPICS] == ["6 partitions"] * 3
    assert after["topic check.rebpf_agent"]["text"] == "1 partition"


@pytest.mark.root
def test_a_missing_topic_of_heartbeats_is_named_and_no_reason_not_to_run(kafka, config):
    for topic in TOPICS:
        kafka.create_topic(f"deaf.{topic}")
    code, found = findings("--config", config("deaf."), "--brokers", kafka.bootstrap)

    assert (code, found["topic deaf.rebpf_agent"]["ok"]) == (0, True)
    assert found["topic deaf.rebpf_agent"]["text"] == "missing: run `rebpf init`; no heartbeats are sent until then"


def test_check_says_that_no_broker_answers():
    code, found = findings("--brokers", f"127.0.0.1:{free_port()}")

    assert code == 69
    assert found["Kafka"]["exit_code"] == 69
    text = str(found["Kafka"]["text"])
    assert text.startswith("no response from Kafka at 127.0.0.1:")
    assert "Connection refused" in text
    assert text.endswith("; check kafka.brokers, and the network: nc -vz HOST PORT")


@pytest.mark.root
def test_check_of_a_host_that_has_everything_is_good(config, tmp_path):
    """With a folder and a port of its own: another producer on this host would add findings."""
    own = f'state_dir = "{tmp_path}"\nmetrics.listen = "127.0.0.1:0"\n'
    arguments = ["--config", config("", own)]
    code, found = findings(*arguments)
    assert code == 0
    assert {"capabilities", "cgroup v2", "BTF", "Python", "bcc", "Kafka"} <= found.keys()
    assert found["Kafka"]["text"] == "no brokers configured: the in-process test broker will be used"
    for stream in ("transmit", "retransmit", "flow"):
        assert "available" in {found[name]["text"] for name in found if name.startswith(f"{stream} by ")}

    text = rebpf("check", *arguments)
    assert text.returncode == 0
    told = [f"{subject}: {each['text']}" for subject, each in found.items()]
    assert [line.partition(" ")[2].lstrip() for line in text.stdout.splitlines()] == told
    assert {line.split()[0] for line in text.stdout.splitlines()} <= {"ok", "no", "WARNING"}
    for line in text.stdout.splitlines():
        assert "transmit by " not in line or line.startswith("ok ") == line.endswith(": available")


def test_check_says_what_an_unprivileged_user_lacks():
    done = rebpf("check", "--json", "--state-dir", "/tmp/rebpf-that-is-not-there", before=as_nobody())
    found = {each["subject"]: each for each in json.loads(done.stdout)}

    assert done.returncode == 77
    assert found["capabilities"]["exit_code"] == 77
    for name in ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"):
        assert name in str(found["capabilities"]["text"])


def test_a_setting_that_the_client_rejects_is_a_configuration_error(config):
    arguments = ["--config", config("", 'kafka.settings = { "lingr.ms" = 5 }'), "--brokers", "127.0.0.1:1"]
    done = rebpf("init", *arguments)

    assert done.returncode == 78
    assert "lingr.ms" in done.stderr
    code, found = findings(*arguments)
    assert code == 78
    assert str(found["kafka.settings"]["text"]).endswith(": did you mean linger.ms?")
    assert "Kafka" not in found, "no client takes it"


def test_a_topic_whose_settings_let_no_event_in(kafka, config):
    kafka.create_topic("tight.tcp_transmit", settings={"max.message.bytes": "999"})
    kafka.create_topic("tight.tcp_retransmit", settings={"min.insync.replicas": "2"})
    done = rebpf("check", "--config", config("tight."), "--brokers", kafka.bootstrap)

    assert done.returncode >= 69
    alter = "kafka-configs.sh --alter --entity-type topics --entity-name"
    for text in (
        "topic tight.tcp_transmit: max.message.bytes is 999, too small for any event: "
        f"{alter} tight.tcp_transmit --add-config max.message.bytes=1048588",
        "topic tight.tcp_retransmit: min.insync.replicas is 2 with 1 replicas, so the topic accepts no events: "
        f"{alter} tight.tcp_retransmit --add-config min.insync.replicas=1",
    ):
        assert f"MISSING {text}" in done.stdout.splitlines()


def test_a_topic_that_compacts(kafka, config):
    kafka.create_topic("compact.tcp_transmit", settings={"cleanup.policy": "compact"})
    kafka.create_topic("compact.tcp_retransmit")
    done = rebpf("check", "--config", config("compact."), "--brokers", kafka.bootstrap)

    alter = "kafka-configs.sh --alter --entity-type topics --entity-name compact.tcp_transmit --add-config"
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING topic")]
    assert warnings == [
        "WARNING topic compact.tcp_transmit: cleanup.policy is compact, which keeps only the last event of each key: "
        f"{alter} cleanup.policy=delete"
    ]


@pytest.mark.root
def test_a_topic_on_one_of_two_brokers(tmp_path, servers_present, config):
    with KafkaServer(tmp_path / "1") as first, Broker(tmp_path / "2", 2, first, 1):
        for topic, replication in zip((*TOPICS, "rebpf_agent"), (1, 2, 2, 2), strict=True):
            first.create_topic(topic, 1, replication=replication)
        code, found = findings("--config", config(""), "--brokers", first.bootstrap)
        done = rebpf("check", "--config", config(""), "--brokers", first.bootstrap)

    assert code == done.returncode == 0
    assert found["Kafka"]["text"] == f"{first.bootstrap}, 2 brokers"
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING topic")]
    assert warnings == [
        "WARNING topic tcp_transmit: one replica on 2 brokers: its events are lost with its broker; "
        "add replicas with kafka-reassign-partitions.sh, or delete it and run `rebpf init --replication 3`"
    ]


def test_topics_of_different_partitions(kafka, config):
    kafka.create_topic("uneven.tcp_transmit", 2)
    kafka.create_topic("uneven.tcp_retransmit", 5)
    _, found = findings("--config", config("uneven."), "--brokers", kafka.bootstrap)

    assert found["topics"]["warning"]
    assert found["topics"]["exit_code"] == 0
    assert str(found["topics"]["text"]).startswith("2 and 5 partitions: ")
    assert "--alter --partitions 5" in str(found["topics"]["text"])
