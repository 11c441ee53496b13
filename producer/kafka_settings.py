"""librdkafka's settings: what delivery rests on, what is ours unless told otherwise, and what may be passed through."""

from collections.abc import Mapping

from producer.errors import ConfigError

REQUIRED: Mapping[str, str] = {
    "enable.idempotence": "true",
    "acks": "all",
    "partitioner": "murmur2_random",
    "message.timeout.ms": "0",
    "allow.auto.create.topics": "false",
    # What is in flight is bounded here; librdkafka's own bounds must not come first.
    "queue.buffering.max.messages": "1000000",
    "queue.buffering.max.kbytes": "2097151",
}
"""What delivery rests on: settings that say otherwise are refused."""

_ALIASES = {"request.required.acks": "acks", "delivery.timeout.ms": "message.timeout.ms"}
_ELSEWHERE = {"bootstrap.servers": "brokers", "metadata.broker.list": "brokers"}

DEFAULTS: Mapping[str, str] = {
    "client.id": "rebpf",
    "compression.codec": "lz4",
    "linger.ms": "20",
    "batch.num.messages": "10000",
    "socket.keepalive.enable": "true",
}
EMBEDDED: Mapping[str, str] = {"test.mock.num.brokers": "1"}
EMBEDDED_PARTITIONS = 4


def client_settings(brokers: str | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Return all of the producer's librdkafka settings; without brokers, those of the embedded cluster.

    Raises ConfigError where `settings` contradicts what delivery rests on.
    """
    for name, value in settings.items():
        required = REQUIRED.get(_ALIASES.get(name, name), value)
        if required != value:
            raise ConfigError(f"kafka.settings.{name}: must be {required}, since delivery rests on it: remove it")
        if name in _ELSEWHERE:
            raise ConfigError(f"kafka.settings.{name}: set kafka.{_ELSEWHERE[name]} instead")
    where = {"bootstrap.servers": brokers} if brokers else EMBEDDED
    return {**DEFAULTS, **settings, **REQUIRED, **where}
