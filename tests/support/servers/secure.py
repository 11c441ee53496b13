"""A real Kafka with TLS, SASL and ACLs."""

import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from .certificates import Authority, Certificate
from .kafka import REQUEST_TIMEOUT_S, KafkaServer
from .process import wait_until_shown

PLAIN, SCRAM = "PLAIN", "SCRAM-SHA-512"
USERS: Mapping[str, str] = {PLAIN: "plainuser", SCRAM: "scramuser"}
"""The user of each mechanism; that of a client certificate is its subject."""
PASSWORD = "secret"
_WHAT_A_PRODUCER_NEEDS = (AclOperation.WRITE, AclOperation.DESCRIBE)


class SecureKafka(KafkaServer):
    """Listeners: SASL_SSL, MUTUAL (TLS, with client certificates), TLS, and PLAINTEXT.

    By PLAINTEXT or TLS comes the administrator; by the others a user, who may do what was granted.
    """

    def __init__(self, folder: Path, *, num_partitions: int = 3) -> None:
        super().__init__(folder, num_partitions=num_partitions)
        self.authority = Authority(folder / "authority")
        self.certificate = self.authority.issue("broker")

    def sasl(self, mechanism: str, password: str = PASSWORD) -> dict[str, str]:
        """Return librdkafka's settings for SASL_SSL as the mechanism's user."""
        return {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.authority.certificate),
            "sasl.mechanism": mechanism,
            "sasl.username": USERS[mechanism],
            "sasl.password": password,
        }

    def tls(self, client: Certificate | None = None) -> dict[str, str]:
        """Return librdkafka's settings for TLS, and for MUTUAL with a client's certificate."""
        trust = {"security.protocol": "SSL", "ssl.ca.location": str(self.authority.certificate)}
        if client is None:
            return trust
        return {**trust, "ssl.key.location": str(client.key), "ssl.certificate.location": str(client.certificate)}

    def grant(self, user: str, name: str, *operations: AclOperation, kind: ResourceType = ResourceType.TOPIC) -> None:
        """Allow a user (scramuser, CN=name) operations on a topic or a group; by default to produce."""
        admin = self._admin()
        wanted = operations or _WHAT_A_PRODUCER_NEEDS
        rules = [AclBinding(*_rule(user, name, operation, kind)) for operation in wanted]
        for done in admin.create_acls(rules, request_timeout=REQUEST_TIMEOUT_S).values():
            done.result()
        self._wait_for_rights(user, name, wanted, kind, granted=True)

    def revoke(self, user: str, topic: str, *operations: AclOperation) -> None:
        """Revoke a user's rights, all or these operations."""
        admin = self._admin()
        wanted = operations or _WHAT_A_PRODUCER_NEEDS
        rules = [AclBindingFilter(*_rule(user, topic, operation)) for operation in wanted]
        for done in admin.delete_acls(rules, request_timeout=REQUEST_TIMEOUT_S).values():
            assert done.result(), f"{user} had no right to {topic}"
        self._wait_for_rights(user, topic, wanted, granted=False)

    def _wait_for_rights(
        self,
        user: str,
        name: str,
        operations: Sequence[AclOperation],
        kind: ResourceType = ResourceType.TOPIC,
        *,
        granted: bool,
    ) -> None:
        admin = self._admin()

        def is_shown() -> bool:
            rules = [AclBindingFilter(*_rule(user, name, operation, kind)) for operation in operations]
            found = [admin.describe_acls(rule, request_timeout=REQUEST_TIMEOUT_S).result() for rule in rules]
            return all(bool(each) == granted for each in found)

        wait_until_shown(f"the rights of {user} to {name}", is_shown)

    def set_password(self, user: str, password: str) -> None:
        """Change the password of a SCRAM user."""
        admin = self._admin()
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, iterations=4096)
        change = UserScramCredentialUpsertion(user, credential, password.encode())
        admin.alter_user_scram_credentials([change], request_timeout=REQUEST_TIMEOUT_S)[user].result()

    def present(self, certificate: Certificate) -> None:
        """Change the certificate of the TLS listener, for new connections."""
        location = {"listener.name.tls.ssl.keystore.location": str(certificate.both)}
        self._set(ConfigResource.Type.BROKER, str(self.node_id), location)
        host, _, port = self.address("TLS").rpartition(":")
        wanted = ssl.PEM_cert_to_DER_cert(certificate.certificate.read_text())

        def is_presented() -> bool:
            found = ssl.get_server_certificate((host, int(port)), timeout=REQUEST_TIMEOUT_S)
            return ssl.PEM_cert_to_DER_cert(found) == wanted

        wait_until_shown("the certificate", is_presented)

    def _protocols(self) -> dict[str, str]:
        return {**super()._protocols(), "SASL_SSL": "SASL_SSL", "MUTUAL": "SSL", "TLS": "SSL"}

    def _properties(self) -> dict[str, str]:
        jaas = "org.apache.kafka.common.security"
        return {
            **super()._properties(),
            "inter.broker.listener.name": "PLAINTEXT",
            "sasl.enabled.mechanisms": f"{SCRAM},{PLAIN}",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                f'{jaas}.plain.PlainLoginModule required user_{USERS[PLAIN]}="{PASSWORD}";'
            ),
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f"{jaas}.scram.ScramLoginModule required;",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.certificate.both),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority.certificate),
            "listener.name.mutual.ssl.client.auth": "required",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        }

    def _format_options(self) -> Sequence[str]:
        user = f"{SCRAM}=[name={USERS[SCRAM]},password={PASSWORD}]"
        return [*super()._format_options(), "--add-scram", user]


def _rule(user: str, name: str, operation: AclOperation, kind: ResourceType = ResourceType.TOPIC) -> tuple[object, ...]:
    resource = (kind, name, ResourcePatternType.LITERAL)
    return (*resource, f"User:{user}", "*", operation, AclPermissionType.ALLOW)
