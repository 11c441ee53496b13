"""Faults between the producer and a secured Kafka: rights, passwords, certificates. See test_faults.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import topics
from tests.support.faults import (
    AGENT,
    PARTITIONS,
    Scene,
    assert_accounted,
    assert_other_port_too,
    assert_same,
    create_topics,
    once,
    retransmitted_syn,
    scene,
)
from tests.support.rebpf import wait_until
from tests.support.servers.certificates import Authority
from tests.support.servers.process import free_port
from tests.support.servers.secure import PASSWORD, PLAIN, SCRAM, USERS, SecureKafka
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]


@pytest.fixture(scope="module")
def secure(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    with SecureKafka(tmp_path_factory.mktemp("secure"), num_partitions=PARTITIONS) as server:
        yield server


@pytest.mark.parametrize("by", [PLAIN, SCRAM, "certificate"])
def test_a_user_who_is_granted_it_delivers(secure, tmp_path, by):
    prefix = f"by-{by}."
    create_topics(secure, prefix)
    user, listener, settings = USERS.get(by), "SASL_SSL", {}
    if user is None:
        user, listener = "CN=client", "MUTUAL"
        settings = secure.tls(secure.authority.issue("client"))
    else:
        settings = secure.sasl(by)
    grant(secure, user, prefix)
    with scene(tmp_path, secure.bootstrap, prefix, brokers=secure.address(listener), settings=settings) as at:
        at.exchange()
        at.finish()

    at.assert_nothing_is_missing()
    assert "WARNING kafka" not in at.run.log


def grant(secure: SecureKafka, user: str, prefix: str) -> None:
    for topic in (TRANSMIT, RETRANSMIT, FLOW, AGENT):
        secure.grant(user, prefix + topic)


def test_a_topic_that_is_no_longer_authorized_does_not_affect_the_others(secure, tmp_path):
    create_topics(secure, "revoked.")
    user, port = USERS[PLAIN], free_port()
    grant(secure, user, "revoked.")
    brokers = secure.address("SASL_SSL")
    with scene(
        tmp_path, secure.bootstrap, "revoked.", brokers=brokers, settings=secure.sasl(PLAIN), ports=(port,)
    ) as at:
        at.exchange()
        at.wait_for_delivery()
        secure.revoke(user, "revoked.tcp_transmit")
        at.exchange()
        at.run.wait_for("WARNING kafka: .*revoked.tcp_transmit.*TOPIC_AUTHORIZATION_FAILED")
        at.wait_for_reason("revoked.tcp_transmit: kafka: TOPIC_AUTHORIZATION_FAILED")
        retransmitted_syn(port)
        topics.wait_for_events(secure.bootstrap, "revoked.tcp_retransmit")
        secure.grant(user, "revoked.tcp_transmit")
        at.exchange()
        at.finish()

    assert_other_port_too(at, port)


def test_sasl_password_refused_until_the_broker_has_it(secure, tmp_path):
    create_topics(secure, "password.")
    grant(secure, USERS[SCRAM], "password.")
    settings = secure.sasl(SCRAM, "next")
    try:
        with scene(
            tmp_path, secure.bootstrap, "password.", brokers=secure.address("SASL_SSL"), settings=settings
        ) as at:
            at.exchange()
            at.run.wait_for("WARNING kafka: .*invalid credentials.* error=_AUTHENTICATION")
            at.wait_for_reason("kafka: _AUTHENTICATION")
            secure.set_password(USERS[SCRAM], "next")
            at.exchange()
            at.finish()
    finally:
        secure.set_password(USERS[SCRAM], PASSWORD)

    at.assert_nothing_is_missing()


@pytest.mark.parametrize("renewed", ["certificate", "password"])
def test_renewed_certificates_and_secrets_are_read_again_after_a_refusal(secure, tmp_path, renewed):
    """An agent of the site renews short-lived files, and restarts nobody."""
    prefix = f"renewed-{renewed}."
    create_topics(secure, prefix)
    if renewed == "certificate":
        user, listener, first = "CN=short", "MUTUAL", secure.authority.issue("short", expired=True)
        files = [tmp_path / name for name in ("client.key", "client.pem")]
        settings = {
            **secure.tls(), "ssl.key.location": str(files[0]), "ssl.certificate.location": str(files[1]),
        }  # fmt: skip
        old, new = ([path.read_text() for path in each[:2]] for each in (first, secure.authority.issue("short")))
        error = "SSL alert .*check ssl.certificate.location"
    else:
        user, listener, files = USERS[PLAIN], "SASL_SSL", [tmp_path / "password"]
        settings = secure.sasl(PLAIN, f"@{files[0]}")
        old, new, error = ["old"], [PASSWORD], "error=_AUTHENTICATION"
    grant(secure, user, prefix)
    write(files, old)
    with scene(tmp_path, secure.bootstrap, prefix, brokers=secure.address(listener), settings=settings) as at:
        at.exchange()
        at.run.wait_for(f"WARNING kafka: .*{error}")
        write(files, new)
        at.exchange()
        at.finish()

    at.assert_nothing_is_missing()
    assert "replacing the client: its certificates or secrets were renewed" in at.run.log


def write(files: list[Path], texts: list[str]) -> None:
    for path, text in zip(files, texts, strict=True):
        path.write_text(text)


@pytest.mark.parametrize("bad", ["expired", "untrusted"])
def test_certificate_refused_until_it_is_renewed(secure, tmp_path, bad):
    prefix = f"{bad}."
    create_topics(secure, prefix)
    by = Authority(tmp_path / "other") if bad == "untrusted" else secure.authority
    secure.present(by.issue("broker", expired=bad == "expired"))
    try:
        with scene(tmp_path, secure.bootstrap, prefix, brokers=secure.address("TLS"), settings=secure.tls()) as at:
            at.exchange()
            at.run.wait_for("WARNING kafka: .*certificate verify failed")
            at.wait_for_reason("kafka: _SSL")
            secure.present(secure.certificate)
            at.exchange()
            at.finish()
    finally:
        secure.present(secure.certificate)

    at.assert_nothing_is_missing()


def deliver_what_waits(folder: Path, bootstrap: str, at: Scene) -> Scene:
    """Start again with a scene's spool, and stop once it is delivered."""
    with scene(folder, bootstrap, at.prefix) as again:
        wait_until("the topic has all", lambda: len(once(at.events())) >= len(at.segments))
        again.finish()
    return again


# A TLS listener closes connections without TLS silently.
@pytest.mark.parametrize(
    ("client", "says"),
    [("TLS", "in state SSL_HANDSHAKE.*security.protocol"), ("PLAINTEXT", "brokers are down.*security.protocol")],
)
def test_tls_against_plaintext(secure, tmp_path, client, says):
    """A mistake in the settings that needs a restart, which delivers everything captured in the meantime."""
    prefix = f"mistaken-{client}."
    create_topics(secure, prefix)
    settings = secure.tls() if client == "TLS" else {}
    brokers = secure.bootstrap if client == "TLS" else secure.address("TLS")
    with scene(tmp_path, secure.bootstrap, prefix, brokers=brokers, settings=settings, stop_timeout_s=0.1) as at:
        at.exchange()
        at.run.wait_for(f"WARNING kafka: .*{says}")
        at.wait_for_reason("kafka: (_TRANSPORT|_ALL_BROKERS_DOWN)")
        at.balance = at.run.finish()
    account = at.balance[prefix + TRANSMIT]
    assert_accounted(account)
    assert account["passed"] == account["spooled"] == len(at.segments)

    again = deliver_what_waits(tmp_path, secure.bootstrap, at)

    assert_same(at.segments, list(once(at.events()).values()))
    again.assert_balance(delivered=len(at.segments))
    assert again.balance[prefix + TRANSMIT]["carried"] == len(at.segments)
