"""Secrets from files, and certificates: they work with Kafka and the registry, and never leak."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import topics
from tests.support.faults import assert_same, once, scene
from tests.support.rebpf import Run, rebpf, wait_until
from tests.support.servers.certificates import Authority
from tests.support.servers.secure import PASSWORD, PLAIN, SCRAM, USERS
from tests.support.servers.tls_proxy import Guarded
from tests.support.traffic import Echo, exchange

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

USER = "agent:reg1stry-s3cret"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def as_toml(settings: Mapping[str, str]) -> str:
    return "[kafka.settings]\n" + "".join(f'"{name}" = "{value}"\n' for name, value in settings.items())


@pytest.mark.parametrize("mechanism", [PLAIN, SCRAM])
def test_the_password_comes_from_a_credential_and_is_seen_nowhere(secure, tmp_path, mechanism):
    prefix = f"hidden-{mechanism}."
    for topic in (*topics.FIXED_IDS, "rebpf_agent"):
        secure.create_topic(prefix + topic)
        secure.grant(USERS[mechanism], prefix + topic)
    (tmp_path / "broker-pass").write_text(f"{PASSWORD}\n")
    config = f'kafka.topic_prefix = "{prefix}"\n' + as_toml(secure.sasl(mechanism, "@broker-pass"))
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path), "REBPF_LOG_LEVEL": "debug"}
    with Echo() as echo:
        arguments = ["--brokers", secure.address("SASL_SSL"), "--port", echo.port]
        with Run(tmp_path / "run", *arguments, config=config, env=credentials) as run:
            run.ready()
            exchange(echo.port, 3)
            topics.wait_for_events(secure.bootstrap, prefix + topics.TRANSMIT)
            seen = [Path(f"/proc/{run.pid}/cmdline").read_text()]
            seen += [path.read_text() for path in run.state_dir.glob("*.json")]
            balance = run.finish()
            seen += [run.log, run.output]

    account = balance[prefix + topics.TRANSMIT]
    assert account["delivered"] == account["passed"] > 0
    assert not [text for text in seen if PASSWORD in text]


def test_the_key_of_a_clients_certificate_is_opened_by_a_password_from_a_file(secure, tmp_path):
    """The error names the wrong password's setting, not the password."""
    client = secure.authority.issue("client")
    encrypt = ["openssl", "ec", "-aes256", "-passout", "pass:k3y-s3cret", "-in", client.key]
    subprocess.run([*encrypt, "-out", tmp_path / "client.key"], check=True, capture_output=True)
    settings = {**secure.tls(client), "ssl.key.location": str(tmp_path / "client.key")}
    arguments = ["--brokers", secure.address("MUTUAL"), "--json"]
    for password, code in (("k3y-s3cret", 0), ("wr0ng-s3cret", 78)):
        (tmp_path / "pass").write_text(password)
        config = tmp_path / "rebpf.toml"
        config.write_text(as_toml({**settings, "ssl.key.password": f"@{tmp_path}/pass"}))
        done = rebpf("check", "--config", config, *arguments)
        subjects = ("Kafka", "kafka.settings")
        (kafka,) = [finding for finding in json.loads(done.stdout) if finding["subject"] in subjects]
        assert kafka["exit_code"] == code, kafka
        assert password not in done.stdout + done.stderr


@pytest.mark.parametrize("mistake", ["password", "certificate"])
def test_a_mistake_is_in_the_health_and_its_fix_delivers_all(secure, tmp_path, mistake):
    """A restart fixes it, since secrets and certificates are read at the start."""
    prefix = f"repaired-{mistake}."
    ours = secure.authority.issue("client")
    user, listener = (USERS[PLAIN], "SASL_SSL") if mistake == "password" else ("CN=client", "MUTUAL")
    for topic in (*topics.FIXED_IDS, "rebpf_agent"):
        secure.create_topic(prefix + topic)
        secure.grant(user, prefix + topic)
    if mistake == "password":
        (tmp_path / "pass").write_text("wr0ng-s3cret\n")
        wrong = right = secure.sasl(PLAIN, f"@{tmp_path}/pass")
        says = "kafka: _AUTHENTICATION"
    else:
        wrong, right = (secure.tls(each) for each in (Authority(tmp_path / "other").issue("client"), ours))
        says = "kafka: (_SSL|_TRANSPORT|_ALL_BROKERS_DOWN)"
    where = (tmp_path, secure.bootstrap, prefix)
    brokers = secure.address(listener)
    with scene(*where, brokers=brokers, settings=wrong, stop_timeout_s=0.1) as at:
        at.exchange()
        at.wait_for_reason(says)
        account = at.run.finish()[prefix + topics.TRANSMIT]
        assert "wr0ng" not in at.run.log
    assert account["passed"] == account["spooled"] == len(at.segments)

    (tmp_path / "pass").write_text(PASSWORD + "\n")
    with scene(*where, brokers=brokers, settings=right) as again:
        wait_until("the topic has all", lambda: len(once(again.events())) >= len(at.segments))
        again.finish()
    assert_same(at.segments, [*once(again.events()).values()])


def config_of(url: str, authority: Authority, tmp_path: Path, user: str) -> Path:
    (tmp_path / "auth").write_text(user + "\n")
    path = tmp_path / "rebpf.toml"
    path.write_text(
        f'kafka.topic_prefix = "guarded."\n[registry]\nurl = "{url}"\nauth = "{tmp_path}/auth"\n'
        f'ca = "{authority.certificate}"\n'
    )
    return path


def test_a_registry_with_tls_and_a_password(kafka, registry, authority, tmp_path):
    with Guarded(registry.url, authority, user=USER) as guarded:
        config = config_of(guarded.url, authority, tmp_path, USER)
        arguments = ["--config", config, "--brokers", kafka.bootstrap]
        done = rebpf("init", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("FULL_TRANSITIVE") == len(topics.FIXED_IDS) + 1, "the events and the heartbeats"
        assert guarded.refused == 0

        config_of(guarded.url, authority, tmp_path, "agent:wr0ng-s3cret")
        done = rebpf("check", *arguments)
        assert done.returncode >= 77
        (line,) = [each for each in done.stdout.splitlines() if "registry" in each]
        assert line.startswith(f"MISSING registry: registry {guarded.url} rejects the authentication: ")
        assert guarded.refused == 1, "it is asked once"
        done = rebpf("init", *arguments)
        assert done.returncode == 77
        assert done.stderr.startswith(f"rebpf: registry {guarded.url} rejects the authentication: ")
        assert "wr0ng" not in done.stdout + done.stderr


def test_a_start_that_the_registry_rejects_is_repeated(kafka, registry, authority, tmp_path):
    """As after an upgrade, whose schemas are not cached, while the registry's users are unavailable."""
    with Guarded(registry.url, authority, user=USER) as guarded:
        config = config_of(guarded.url, authority, tmp_path, "agent:wr0ng-s3cret").read_text()
        with Run(tmp_path / "run", "--brokers", kafka.bootstrap, config=config) as run:
            code = run.wait()
            assert f"rebpf: registry {guarded.url} rejects the authentication: " in run.log
    unit = (Path(__file__).parents[2] / "deploy/systemd/rebpf.service").read_text()
    assert str(code) not in re.search("RestartPreventExitStatus=(.*)", unit)[1].split()


def test_all_that_asks_the_registry_has_the_password(kafka, registry, authority, tmp_path):
    with Guarded(registry.url, authority, user=USER) as guarded, Echo() as echo:
        path = config_of(guarded.url, authority, tmp_path, USER)
        path.write_text(path.read_text().replace("guarded.", "readers."))
        arguments = ["--config", path, "--brokers", kafka.bootstrap]
        assert rebpf("init", *arguments).returncode == 0
        with Run(tmp_path / "run", *arguments[2:], "--port", echo.port, config=path.read_text()) as run:
            run.ready()
            exchange(echo.port, 3)
            run.finish()
            assert "s3cret" not in run.log
        verified = rebpf("verify", *arguments)
        shown = rebpf("tail", *arguments, "--from-beginning", "-n", 1, "--json")

    assert (verified.returncode, verified.stderr) == (0, "")
    assert json.loads(shown.stdout)["dport"]
    assert guarded.refused == 0


def test_a_registry_whose_certificate_is_not_trusted(registry, authority, tmp_path):
    other = Authority(tmp_path / "other")
    with Guarded(registry.url, authority, user=USER) as guarded:
        config = config_of(guarded.url, other, tmp_path, USER)
        done = rebpf("check", "--config", config, "--json")
        (finding,) = [each for each in json.loads(done.stdout) if each["subject"] == "registry"]

    assert finding["exit_code"] == 69
    assert "certificate verify failed" in finding["text"].lower()


def test_a_registry_that_wants_a_certificate(registry, authority, tmp_path):
    client = authority.issue("client")
    with Guarded(registry.url, authority) as guarded:
        config = tmp_path / "rebpf.toml"
        text = f'[registry]\nurl = "{guarded.url}"\nca = "{authority.certificate}"\n'
        for more, is_let_in in ((f'certificate = "{client.certificate}"\nkey = "{client.key}"\n', True), ("", False)):
            config.write_text(text + more)
            done = rebpf("check", "--config", config, "--json")
            (finding, *_) = [each for each in json.loads(done.stdout) if "registry" in each["text"]]
            assert finding["subject"].startswith("schema ") == is_let_in, finding


def test_missing_certificates_are_a_configuration_error(tmp_path):
    config = tmp_path / "rebpf.toml"
    config.write_text('[registry]\nurl = "https://127.0.0.1:1"\nca = "/none.pem"\n')
    done = rebpf("check", "--config", config, "--json")
    (finding,) = [each for each in json.loads(done.stdout) if each["subject"] == "registry"]

    assert finding["exit_code"] == 78
    assert finding["text"].startswith(f"{config}: line 1: registry: ")
