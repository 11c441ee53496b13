"""A Kafka consumer without side effects: it joins no group, commits nothing, and assigns partitions by hand.

librdkafka requires a group id; it is not used.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from producer.config.librdkafka import consumer_settings
from producer.errors import PermissionDenied, RebpfError, UnavailableError
from producer.kafka.confluent import ClientErrors, open_client
from producer.kafka.wording import grant


def is_passing(error: KafkaError) -> bool:
    """Return whether reading can continue after an error: it is temporary, or about the group, which is not used."""
    return bool(error.retriable()) or error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED


def topic_error(topic: str | None, error: KafkaError) -> RebpfError:
    """Return the error to raise for one of a topic, with the fix."""
    if error.code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return UnavailableError(f"topic {topic}: {error.str()}")
    fix = grant(f"--topic {topic}", "--operation READ --operation DESCRIBE")
    return PermissionDenied(f"topic {topic}: this user may not read it: {fix}")


def offsets(
    client: Consumer, partitions: Iterable[tuple[str, int]], time_ms: int, timeout_s: float
) -> dict[tuple[str, int], int]:
    """Return each partition's first offset of this time or later; -1 if there is none. With OFFSET_END, its end.

    One request to each broker: once messages are fetched, each request waits for the answer to a fetch.
    """
    asked = [TopicPartition(*partition, time_ms) for partition in partitions]
    answers = client.offsets_for_times(asked, timeout=timeout_s) if asked else []
    for each in answers:
        if each.error is not None:
            raise KafkaException(each.error)
    return {(each.topic, each.partition): each.offset for each in answers}


class QuietConsumer:
    """A consumer of `brokers`; `client` is confluent-kafka's. `purpose` is part of the group id.

    `settings` are the user's; `overrides` take precedence. Raises ConfigError if librdkafka rejects them.
    """

    def __init__(self, brokers: str, purpose: str, settings: Mapping[str, str], overrides: Mapping[str, str]) -> None:
        self.errors = ClientErrors(brokers, log=True)
        group = {"group.id": f"rebpf-{purpose}-{uuid.uuid4()}"}
        conf = {**consumer_settings(brokers, settings), **group, **overrides, "error_cb": self.errors}
        self.client = open_client(Consumer, conf)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise UnavailableError if no broker answers, PermissionDenied if they reject the credentials."""
        try:
            yield
        except KafkaException as exc:
            self.client.poll(0)  # takes the errors that say more than that there was no response in time
            raise self.errors.worded(exc) from exc
