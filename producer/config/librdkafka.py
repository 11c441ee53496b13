"""librdkafka's settings: which are fixed, which are rejected, and which the user may set.

Each setting of the library is fixed (REQUIRED, AT_DEFAULT), rejected with a reason (REFUSED), or free: passed on to
producers, to consumers, or to all clients. A test lists the free ones, too, and fails if the installed
library has a setting in none of the lists.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from producer.errors import ConfigError
from producer.host import state_file

REQUIRED: Mapping[str, str] = {
    "enable.idempotence": "true",
    "acks": "all",
    "partitioner": "murmur2_random",
    "message.timeout.ms": "0",
    "allow.auto.create.topics": "false",
    # The producer bounds the messages in flight; librdkafka's own limits must not be reached first.
    "queue.buffering.max.messages": "1000000",
    "queue.buffering.max.kbytes": "2097151",
}
"""Settings that delivery depends on; other values are rejected."""

AT_DEFAULT: Mapping[str, str] = {
    "delivery.report.only.error": "false",
    "enable.gapless.guarantee": "false",
    "message.send.max.retries": "2147483647",
    # Otherwise the library takes brokers for old ones without idempotence, and delivers nothing.
    "api.version.request": "true",
    "api.version.fallback.ms": "0",
    "queuing.strategy": "fifo",
}
"""The same, but at the library's default, so they are not passed on."""

_ALIASES = {
    "request.required.acks": "acks",
    "delivery.timeout.ms": "message.timeout.ms",
    "retries": "message.send.max.retries",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OURS = "since rebpf sets it"
_CODE = "since it loads code into the producer or runs a command"
_BROKERS = "since kafka.brokers sets it"
_OFFSETS = "since rebpf alert commits offsets after sending alerts, and other readers never do"
_TRANSACTION = "since rebpf never commits a transaction, and no consumer would see the events"
_PROTOCOL = "since rebpf alert needs the classic protocol"

_REASONS: Mapping[str, str] = {
    _BROKERS: "bootstrap.servers metadata.broker.list",
    "since it would replace kafka.brokers by a test broker, which stores nothing": (
        "test.mock.num.brokers test.mock.broker.rtt"
    ),
    _TRANSACTION: "transactional.id transaction.timeout.ms",
    _CODE: (
        "plugin.library.paths interceptors ssl.engine.location ssl.engine.id ssl.providers ssl_engine_callback_data "
        "sasl.kerberos.kinit.cmd"
    ),
    _OURS: (
        "enabled_events log.queue opaque default_topic_conf error_cb throttle_cb stats_cb log_cb background_event_cb "
        "socket_cb connect_cb closesocket_cb open_cb resolve_cb oauthbearer_token_refresh_cb consume_cb rebalance_cb "
        "offset_commit_cb dr_cb dr_msg_cb partitioner_cb msg_order_cmp ssl.certificate.verify_cb ssl_key "
        "ssl_certificate ssl_ca enable_sasl_queue enable.partition.eof auto.offset.reset consume.callback.max.messages "
        "max.poll.records share.acknowledgement.mode builtin.features client.software.name internal.termination.signal"
    ),
    "since alert.group sets it": "group.id",
    _PROTOCOL: "partition.assignment.strategy group.protocol.type group.protocol group.remote.assignor",
    _OFFSETS: (
        "enable.auto.commit auto.commit.enable auto.commit.interval.ms enable.auto.offset.store offset.store.method "
        "offset.store.path offset.store.sync.interval.ms"
    ),
    "since it could hide the topics of the events": "topic.blacklist",
}
REFUSED: Mapping[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Rejected settings, each with the reason."""

FREE_OF_PRODUCERS = _names(
    """
    queue.buffering.max.ms linger.ms
    queue.buffering.backpressure.threshold compression.codec compression.type compression.level batch.num.messages
    batch.size sticky.partitioning.linger.ms request.timeout.ms produce.offset.report
    """
)
"""Passed to producers only."""

FREE_OF_CONSUMERS = _names(
    """
    group.instance.id session.timeout.ms heartbeat.interval.ms coordinator.query.interval.ms max.poll.interval.ms
    queued.min.messages queued.max.messages.kbytes fetch.wait.max.ms fetch.queue.backoff.ms fetch.message.max.bytes
    max.partition.fetch.bytes fetch.max.bytes fetch.min.bytes fetch.error.backoff.ms isolation.level check.crcs
    """
)
"""Passed to consumers only."""

_BACKOFF, _MOST_BACKOFF = "reconnect.backoff.ms", "reconnect.backoff.max.ms"
DEFAULTS: Mapping[str, str] = {
    "client.id": "rebpf",
    "compression.codec": "zstd",
    "linger.ms": "5",  # librdkafka's default too: a read of a ring is a batch already
    "batch.num.messages": "10000",
    "socket.keepalive.enable": "true",
    # While no broker is reachable, the library tries every half of this, at most every second, and does not back off.
    _BACKOFF: "2000",
}
_ZSTD_LEVEL = {"compression.level": "1"}
"""A sixth less CPU of the host than with librdkafka's default, 3, for up to a twentieth more bytes."""
_CONSUMER_DEFAULTS = {
    "socket.keepalive.enable": "true",
    # We use no transactions, and one that somebody leaves open would hide our messages.
    "isolation.level": "read_uncommitted",
}
_CONSUMER_REQUIRED = {
    "allow.auto.create.topics": "false",
    "auto.offset.reset": "earliest",
    "enable.auto.commit": "false",
}
FILES = _names(
    """
    ssl.key.location ssl.certificate.location ssl.ca.location https.ca.location ssl.crl.location ssl.keystore.location
    sasl.kerberos.keytab sasl.oauthbearer.assertion.private.key.file sasl.oauthbearer.assertion.file
    sasl.oauthbearer.assertion.jwt.template.file
    """
)
"""Files that the library opens, and that a pipe or a device must not stand for."""

NUMBERS = re.compile(
    r".+\.(?:ms|k?bytes|messages|size|threshold|cnt|fails|ttl|seconds|relogin|flight|connection)"
    r"|compression\.level|log_level"
)
"""The names of the free settings that are numbers."""
FRACTIONS = frozenset({"linger.ms", "queue.buffering.max.ms"})
"""Those that need not be whole."""
_WHOLE, _FRACTION = r"-?(?:0|[1-9][0-9]*)", r"(?:\.[0-9]+)?"

_LEAST_MS = 1000
_TIMES = (
    ("connections.max.idle.ms", ("0",)),
    ("metadata.recovery.rebootstrap.trigger.ms", ()),
    ("socket.timeout.ms", ()),
    ("topic.metadata.refresh.interval.ms", ("-1", "0")),
)
"""With less than `_LEAST_MS`, the library closes connections before a broker has answered, or fills them with requests
for metadata. The values that turn a setting off are also accepted."""

TEST_BROKER: Mapping[str, str] = {"test.mock.num.brokers": "1"}
TEST_BROKER_PARTITIONS = 4


def check_allowed(settings: Mapping[str, str]) -> None:
    """Raise ConfigError for the first setting that is rejected or that must have another value."""
    for name, value in settings.items():
        required = {**REQUIRED, **AT_DEFAULT}.get(_ALIASES.get(name, name), value)
        if required != value:
            raise ConfigError(f"kafka.settings.{name}: must be {required}, since delivery depends on it: remove it")
        if name in REFUSED:
            raise ConfigError(f"kafka.settings.{name}: must not be set, {REFUSED[name]}: remove it")
        # The library would read "5s" as 5, 1e3 as 1 and 010 as 8.
        if NUMBERS.fullmatch(name) and not re.fullmatch(_WHOLE + _FRACTION * (name in FRACTIONS), value):
            kind = "a number" if name in FRACTIONS else "a whole number"
            raise ConfigError(f"kafka.settings.{name}: expected {kind} without a unit, found {value!r}")
    _check_tokens(settings)


def _check_tokens(settings: Mapping[str, str]) -> None:
    """Raise ConfigError if the library would wait for a token from us, without a connection or a word."""
    method = settings.get("sasl.oauthbearer.method", "").lower()
    unsecured = settings.get("enable.sasl.oauthbearer.unsecure.jwt", "").lower() in ("true", "t", "1")
    for name in ("sasl.mechanism", "sasl.mechanisms"):
        if settings.get(name, "").upper() == "OAUTHBEARER" and method != "oidc" and not unsecured:
            raise ConfigError(f'kafka.settings.{name}: OAUTHBEARER needs "sasl.oauthbearer.method" = "oidc"')


def check_times(settings: Mapping[str, str], spill_after_s: float) -> None:
    """Raise ConfigError for a time with which the client would deliver nothing, or only spooled events.

    `check_allowed` has accepted the settings.
    """
    most_ms = 1000 * spill_after_s
    for name in ("linger.ms", "queue.buffering.max.ms"):
        if float(settings.get(name, -1)) >= most_ms:
            raise ConfigError(f"kafka.settings.{name}: expected less than spool.spill_after_s, {most_ms:g} ms")
    for name, off in _TIMES:
        if name in settings and not (float(settings[name]) >= _LEAST_MS or settings[name] in off):
            unless = f"{' or '.join([*off, ''])}at least {_LEAST_MS}"
            raise ConfigError(f"kafka.settings.{name}: expected {unless}, found {settings[name]}")


def _check(settings: Mapping[str, str]) -> None:
    """Raise ConfigError as `check_allowed`, and if the library would block on a file, or read it forever."""
    check_allowed(settings)
    for name in settings.keys() & FILES:
        try:
            state_file.check_ordinary(Path(settings[name]))
        except state_file.NotAFileError as error:
            raise ConfigError(f"kafka.settings.{name}: {settings[name]}: {error.strerror}") from error


def unreadable(settings: Mapping[str, str]) -> str:
    """Return which file of a client cannot be read, and why; empty if all can."""
    for name in sorted(settings.keys() & FILES):
        try:
            os.close(os.open(settings[name], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            fix = f": chown {os.geteuid()} {settings[name]}" if isinstance(error, PermissionError) else ""
            return f"kafka.settings.{name}: {settings[name]}: {error.strerror}{fix}"
    return ""


def client_settings(brokers: str | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Return all librdkafka settings of a producer; without brokers, those of the in-process test broker.

    Raises ConfigError for settings that `check_allowed` rejects, and for paths that are not regular files.
    """
    _check(settings)
    where = {"bootstrap.servers": brokers} if brokers else TEST_BROKER
    codec = settings.get("compression.codec") or settings.get("compression.type", DEFAULTS["compression.codec"])
    defaults = {**DEFAULTS, **(_ZSTD_LEVEL if codec == "zstd" else {})}
    if _MOST_BACKOFF in settings:  # the library rejects a backoff above it
        del defaults[_BACKOFF]
    return {**defaults, **_without(settings, FREE_OF_CONSUMERS), **REQUIRED, **where}


def consumer_settings(brokers: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Return all librdkafka settings of a consumer except its group. Raises ConfigError as `client_settings`."""
    _check(settings)
    users = _without(settings, FREE_OF_PRODUCERS | REQUIRED.keys())
    return {**_CONSUMER_DEFAULTS, **users, **_CONSUMER_REQUIRED, "bootstrap.servers": brokers}


def admin_settings(brokers: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Return all librdkafka settings of an admin client. Raises ConfigError as `client_settings`."""
    _check(settings)
    users = _without(settings, FREE_OF_PRODUCERS | FREE_OF_CONSUMERS | REQUIRED.keys())
    return {**users, "allow.auto.create.topics": "false", "bootstrap.servers": brokers}


def _without(settings: Mapping[str, str], left_out: frozenset[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in settings.items()
        if name not in left_out and _ALIASES.get(name, name) not in {*left_out, *AT_DEFAULT}
    }
