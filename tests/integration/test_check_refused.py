"""`rebpf check` against servers that refuse it, or have something else."""

import json
from collections.abc import Mapping

import pytest
from confluent_kafka.admin import AclOperation
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

from tests.support.rebpf import findings, rebpf
from tests.support.servers.certificates import Authority
from tests.support.servers.process import free_port
from tests.support.servers.secure import PLAIN, SCRAM, USERS, SecureKafka
from tests.support.servers.tls_proxy import Guarded

pytestmark = pytest.mark.real_kafka

TOPICS = ("tcp_transmit", "tcp_retransmit", "tcp_flow")


def as_toml(settings: Mapping[str, str]) -> str:
    return "[kafka.settings]\n" + "".join(f'"{name}" = "{value}"\n' for name, value in settings.items())


def check_secure(secure: SecureKafka, config, prefix: str, settings: Mapping[str, str], listener: str = "SASL_SSL"):
    more = as_toml(settings)
    return findings("--config", config(prefix, more), "--brokers", secure.address(listener))


def test_authentication_refused(secure, config):
    code, found = check_secure(secure, config, "", secure.sasl(SCRAM, "wrong-secret"))

    assert code == 77
    assert found["Kafka"]["exit_code"] == 77
    text = str(found["Kafka"]["text"])
    assert text.startswith(f"Kafka at {secure.address('SASL_SSL')} rejects the authentication: ")
    assert "sasl.password" in text
    assert "wrong-secret" not in json.dumps(found)


@pytest.mark.parametrize("command", ["alert", "tail", "verify"])
def test_a_reader_whose_authentication_is_refused_says_so(secure, config, command):
    path = config("", as_toml(secure.sasl(SCRAM, "wrong-secret")))
    done = rebpf(command, "--config", path, "--brokers", secure.address("SASL_SSL"))

    assert done.returncode == 77
    assert f"rebpf: Kafka at {secure.address('SASL_SSL')} rejects the authentication: " in done.stderr
    assert "wrong-secret" not in done.stderr


def test_tls_that_fails(secure, config, tmp_path):
    other = Authority(tmp_path / "other")
    settings = {**secure.tls(), "ssl.ca.location": str(other.certificate)}
    code, found = check_secure(secure, config, "", settings, "TLS")

    assert code >= 69
    assert found["Kafka"]["exit_code"] == 69
    assert str(found["Kafka"]["text"]).startswith(f"TLS with Kafka at {secure.address('TLS')} failed: ")
    assert "ssl.ca.location" in str(found["Kafka"]["text"])


@pytest.mark.parametrize("client", ["TLS", "PLAINTEXT"])
def test_tls_against_plaintext(secure, config, client):
    settings, listener = (secure.tls(), "PLAINTEXT") if client == "TLS" else ({}, "TLS")
    code, found = check_secure(secure, config, "", settings, listener)

    assert code >= 69
    assert found["Kafka"]["exit_code"] == 69
    assert "security.protocol" in str(found["Kafka"]["text"])


def test_a_topic_that_is_not_ours_to_write(secure, config):
    secure.create_topic("acl.tcp_transmit")
    secure.create_topic("acl.tcp_retransmit")
    secure.grant(USERS[PLAIN], "acl.tcp_transmit")
    code, found = check_secure(secure, config, "acl.", secure.sasl(PLAIN))

    assert code == 77
    assert found["topic acl.tcp_retransmit"]["exit_code"] == 77
    grant = "kafka-acls.sh --add --producer --topic acl.tcp_retransmit --allow-principal User:NAME"
    assert found["topic acl.tcp_retransmit"]["text"] == f"this user may not describe it: {grant}"
    assert found["topic acl.tcp_transmit"]["ok"]
    assert found["topic acl.tcp_transmit"]["text"] == "3 partitions; this user may not describe its settings"


def test_a_topic_that_may_be_seen_and_not_written(secure, config):
    for topic in TOPICS:
        secure.create_topic(f"read-only.{topic}")
        secure.grant(USERS[PLAIN], f"read-only.{topic}")
    secure.revoke(USERS[PLAIN], "read-only.tcp_transmit", AclOperation.WRITE)
    code, _ = check_secure(secure, config, "read-only.", secure.sasl(PLAIN))
    arguments = ["--config", config("read-only.", as_toml(secure.sasl(PLAIN)))]
    done = rebpf("check", *arguments, "--brokers", secure.address("SASL_SSL"))

    assert code == done.returncode == 77
    assert (
        "MISSING topic read-only.tcp_transmit: this user may not write to it: "
        "kafka-acls.sh --add --producer --topic read-only.tcp_transmit --allow-principal User:NAME"
    ) in done.stdout.splitlines()
    assert "may not write to it: kafka-acls.sh --add --producer --topic read-only.tcp_retransmit" not in done.stdout


def test_a_registry_that_refuses_the_password(kafka, registry, config, tmp_path):
    authority = Authority(tmp_path / "authority")
    (tmp_path / "auth").write_text("agent:wr0ng-s3cret\n")
    with Guarded(registry.url, authority, user="agent:right") as guarded:
        more = f'[registry]\nurl = "{guarded.url}"\nauth = "{tmp_path}/auth"\nca = "{authority.certificate}"\n'
        code, found = findings("--config", config("guarded.", more), "--brokers", kafka.bootstrap)

    assert code == 77
    assert found["registry"]["exit_code"] == 77
    text = str(found["registry"]["text"])
    assert text.startswith(f"registry {guarded.url} rejects the authentication: ")
    assert text.endswith("; put USER:PASSWORD into the file named by registry.auth, or check registry.certificate")
    assert "wr0ng" not in json.dumps(found)


def test_a_registry_that_does_not_answer(kafka, config):
    url = f"http://127.0.0.1:{free_port()}"
    code, found = findings("--config", config("check."), "--brokers", kafka.bootstrap, "--registry", url)

    assert code >= 69
    assert found["registry"]["exit_code"] == 69
    assert str(found["registry"]["text"]).startswith(f"registry {url} does not answer: ")
    assert str(found["registry"]["text"]).endswith(f"; check registry.url, and the network: curl -f {url}/subjects")


def test_a_registry_without_our_schemas_or_with_others(kafka, registry, config):
    arguments = ["--config", config("schemas."), "--brokers", kafka.bootstrap, "--registry", registry.url]
    code, found = findings(*arguments)
    assert code == 78
    for topic in TOPICS:
        finding = found[f"schema schemas.{topic}-value"]
        assert finding["exit_code"] == 78
        assert str(finding["text"]).endswith(f"does not have schemas.{topic}-value in this version: run `rebpf init`")
    assert found["schema schemas.rebpf_agent-value"]["ok"]

    assert rebpf("init", *arguments).returncode == 0
    _, found = findings(*arguments)
    for topic in (*TOPICS, "rebpf_agent"):
        assert str(found[f"schema schemas.{topic}-value"]["text"]).startswith("id ")

    subject = "alien.tcp_transmit-value"
    with SchemaRegistryClient({"url": registry.url, "timeout": 10}) as client:
        alien = {"type": "record", "name": "Alien", "fields": [{"name": "ts", "type": "string"}]}
        client.set_compatibility(subject, "FULL_TRANSITIVE")
        client.register_schema(subject, Schema(json.dumps(alien), "AVRO"))
    arguments[1] = config("alien.")
    code, found = findings(*arguments)
    assert code == 78
    assert found[f"schema {subject}"]["exit_code"] == 78
    assert found[f"schema {subject}"]["text"] == (
        f"registry {registry.url} has schemas that are incompatible with this version's: "
        "use another kafka.topic_prefix, or delete the subject and run `rebpf init`"
    )

    arguments[1] = config("unborn.", "registry.register = true\n")
    found = findings(*arguments)[1]["schema unborn.tcp_transmit-value"]
    assert found["ok"], "a producer that may register it does so at its start"
