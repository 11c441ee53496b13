"""Kafka's admin client: describes and creates topics."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, ClusterMetadata, ConfigResource, TopicDescription
from confluent_kafka.cimpl import NewTopic
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from producer.config.librdkafka import admin_settings
from producer.config.load import Config
from producer.errors import PermissionDenied, RebpfError, UnavailableError
from producer.host.progress import Progress
from producer.host.reachable import unreachable
from producer.kafka.confluent import NEEDS_KAFKA, ClientErrors, is_test_broker, list_topics, open_client
from producer.kafka.wording import grant, may_not_write

_ANSWER_TIMEOUT_S = 5.0
_CREATE_TIMEOUT_S = 10.0
DAY_MS = 86_400_000
_TOPIC_SETTINGS = {
    "cleanup.policy": "delete",
    "retention.ms": str(7 * DAY_MS),
    # The broker stores batches as the producer compressed them.
    "compression.type": "producer",
    "message.timestamp.type": "CreateTime",
}
# Few and worth keeping: compressed well, whatever the producers' setting.
_KEPT_LONG = {"retention.ms": str(30 * DAY_MS), "compression.type": "zstd"}
_SETTINGS_OF: Mapping[str, Mapping[str, str]] = {
    "transmit": {"retention.ms": str(DAY_MS)},
    "retransmit": _KEPT_LONG,
    "flow": _KEPT_LONG,
}
_REPLICAS_FOR_ONE_TO_SPARE = 3


def in_partitions(count: int) -> str:
    """Return '1 partition' or 'N partitions'."""
    return f"{count} partition{'s' if count > 1 else ''}"


def topic_settings(replication: int, feed: str = "") -> dict[str, str]:
    """Return the default settings of a new topic for a feed, by its name.

    With three or more replicas, the topic accepts events while one is down.
    """
    settings = {**_TOPIC_SETTINGS, **_SETTINGS_OF.get(feed, {})}
    if replication >= _REPLICAS_FOR_ONE_TO_SPARE:
        settings["min.insync.replicas"] = str(replication - 1)
    return settings


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic's description. `replication` is that of the partition with the fewest replicas.

    `settings` is empty if this user may not describe them.
    """

    partitions: int
    replication: int
    may_write: bool
    settings: Mapping[str, str]

    def number(self, name: str) -> int | None:
        """Return a numeric setting; None if not shown."""
        return int(self.settings[name]) if name in self.settings else None


class Admin:
    """Describes and creates a cluster's topics. Raises ConfigError for settings that librdkafka rejects."""

    def __init__(self, config: Config) -> None:
        self._brokers = config.kafka.brokers
        self._errors = ClientErrors(str(self._brokers), log=False)
        conf = {**admin_settings(str(self._brokers), config.kafka.settings), "error_cb": self._errors}
        self._client = open_client(AdminClient, conf)

    def partitions(self) -> dict[str, int]:
        """Return each topic's number of partitions; UnavailableError if no broker answers."""
        return {name: len(topic.partitions) for name, topic in self._metadata().topics.items()}

    def brokers(self) -> int:
        """Return the number of brokers."""
        return len(self._metadata().brokers)

    def require_reachable(self) -> None:
        """Raise UnavailableError if this host cannot reach all brokers that the cluster advertises.

        Also if they are the test broker, which does not answer what follows.
        """
        with Progress(f"connecting to Kafka at {self._brokers}"):
            found = self._metadata()
            brokers = [(str(broker.host), broker.port) for broker in found.brokers.values()]
            failed = unreachable(brokers)
        if failed:
            reasons = ", ".join(f"{host}:{port} ({reason})" for (host, port), reason in failed.items())
            raise UnavailableError(
                f"Kafka at {self._brokers} answers, but advertises brokers that this host cannot reach: {reasons}; "
                "set advertised.listeners to names that resolve here, or add these names to DNS or /etc/hosts"
            )
        if is_test_broker(found):
            raise UnavailableError(f"Kafka at {self._brokers}: {NEEDS_KAFKA}")

    def describe(self, names: Sequence[str]) -> dict[str, TopicInfo | RebpfError]:
        """Return each topic's description, or an error with its fix."""
        described = self._client.describe_topics(
            TopicCollection(list(names)), include_authorized_operations=True, request_timeout=_CREATE_TIMEOUT_S
        )
        return {name: self._facts(name, described[name]) for name in names}

    def _facts(self, name: str, described: "Future[TopicDescription]") -> TopicInfo | RebpfError:
        try:
            topic = described.result()
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return UnavailableError("missing: run `rebpf init`")
            if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                return PermissionDenied(f"this user may not describe it: {grant(f'--topic {name}', '--producer')}")
            return UnavailableError(error.args[0].str())
        allowed = set(topic.authorized_operations or ())
        may_write = not allowed or bool(allowed & {AclOperation.WRITE, AclOperation.ALL})
        replication = min((len(partition.replicas) for partition in topic.partitions), default=0)
        return TopicInfo(len(topic.partitions), replication, may_write, self._settings(name))

    def require_write(self, name: str) -> None:
        """Raise PermissionDenied if this user may not write to a topic."""
        info = self.describe([name])[name]
        if isinstance(info, TopicInfo) and not info.may_write:
            raise PermissionDenied(f"topic {name}: {may_not_write(name)}")

    def _settings(self, name: str) -> dict[str, str]:
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        asked = self._client.describe_configs([resource], request_timeout=_CREATE_TIMEOUT_S)
        try:
            return {key: entry.value for key, entry in asked[resource].result().items()}
        except KafkaException:  # a producer's user is rarely allowed to
            return {}

    def _metadata(self) -> ClusterMetadata:
        try:
            return list_topics(self._client, _ANSWER_TIMEOUT_S)
        except KafkaException as error:
            self._client.poll(0)  # calls error_cb
            raise self._errors.worded(error) from error

    def create(self, name: str, partitions: int, replication: int, settings: Mapping[str, str]) -> bool:
        """Create a topic; return False if it exists. Raises UnavailableError if it fails."""
        topic = NewTopic(name, partitions, replication, config=dict(settings))
        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            wait=wait_random_exponential(multiplier=0.5, max=5),
            stop=stop_after_attempt(3),
            reraise=True,
        )
        try:
            retrying(lambda: self._client.create_topics([topic], request_timeout=_CREATE_TIMEOUT_S)[name].result())
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.TOPIC_ALREADY_EXISTS:
                return False
            if code in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED):
                if name in self.partitions():  # brokers look at the rights first
                    return False
                fix = grant(f"--topic {name}", "--operation CREATE")
                raise PermissionDenied(f"this user may not create topic {name}: {fix}") from error
            raise UnavailableError(f"cannot create topic {name}: {error.args[0].str()}") from error
        return True


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, KafkaException) and (
        error.args[0].retriable() or error.args[0].code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT)
    )
