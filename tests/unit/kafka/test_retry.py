"""What is retried, and when; and what each error of a client means."""

from collections.abc import Iterator

import numpy as np
import pytest
from confluent_kafka import KafkaError, KafkaException
from numpy.typing import NDArray

from producer.errors import PermissionDenied, RebpfError, UnavailableError
from producer.events import Topic
from producer.kafka.confluent import ClientErrors
from producer.kafka.retry import Retry


class NoBackOff:
    def next(self) -> float:
        return 0.0

    def reset(self) -> None:
        pass


class Sent:
    """What was sent. Fails once `left` is exhausted."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int], bool]] = []
        self.left: Iterator[int] = iter(range(1000))

    def __call__(self, number: int, rows: NDArray[np.int64], alone: bool) -> None:
        if next(self.left, None) is None:
            raise MemoryError
        self.calls.append((number, rows.tolist(), alone))


def rows(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


@pytest.fixture
def retry() -> Retry:
    return Retry(Topic("t"), NoBackOff())


def test_waiting_messages_are_sent_in_order_once_nothing_else_is_in_flight(retry: Retry) -> None:
    sent = Sent()
    retry.later(7, rows(5, 6), "LEADER_NOT_AVAILABLE")
    retry.later(3, rows(1), "NOT_ENOUGH_REPLICAS")
    retry.later(7, rows(0, 2), "NOT_ENOUGH_REPLICAS")
    retry.resend(6, sent)
    assert sent.calls == []
    assert (retry.busy, retry.error) == (True, "NOT_ENOUGH_REPLICAS")
    retry.resend(5, sent)
    assert sent.calls == [(3, [1], False), (7, [0, 2, 5, 6], False)]
    assert not retry.busy


@pytest.mark.parametrize("done", range(4))
def test_a_failure_while_sending_leaves_the_rest_for_the_next_time(retry: Retry, done: int) -> None:
    sent = Sent()
    sent.left = iter(range(done))
    retry.one_by_one(1, rows(4), "INVALID_RECORD")
    for number in (1, 2, 3):
        retry.later(number, rows(number), "LEADER_NOT_AVAILABLE")
    with pytest.raises(MemoryError):
        retry.resend(3, sent)
    assert len(sent.calls) == done
    sent.left = iter(range(1000))
    # What was sent is in flight; the others wait for it, but for those that go alone.
    retry.resend(3, sent)
    retry.resend(3 - max(0, done - 1), sent)
    assert sent.calls == [(1, [4], True), (1, [1], False), (2, [2], False), (3, [3], False)]


def test_messages_that_are_sent_alone_keep_others_back_until_their_results(retry: Retry) -> None:
    sent = Sent()
    retry.one_by_one(1, rows(0, 1), "INVALID_RECORD")
    assert retry.busy
    retry.resend(2, sent)
    assert sent.calls == [(1, [0, 1], True)]
    retry.returned(1)
    assert retry.busy
    retry.returned(1)
    assert not retry.busy


def test_messages_that_are_sent_alone_are_logged_once_in_a_while(
    retry: Retry, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        retry.one_by_one(number, rows(0, 1), "MSG_SIZE_TOO_LARGE")
    assert [record.message for record in caplog.records] == [
        "kafka: retrying 2 messages one by one topic=t error=MSG_SIZE_TOO_LARGE"
    ]


def test_after_a_restart_nothing_of_before_is_sent(retry: Retry) -> None:
    sent = Sent()
    retry.one_by_one(1, rows(0), "INVALID_RECORD")
    retry.later(2, rows(0), "LEADER_NOT_AVAILABLE")
    retry.restart()
    assert not retry.busy
    retry.hold(2, rows(0))
    retry.resend(1, sent)
    assert sent.calls == [(2, [0], False)]


def worded(*codes: int, text: str = "the reason") -> RebpfError:
    errors = ClientErrors("b:1", log=False)
    for code in codes:
        errors(KafkaError(code, text))
    return errors.worded(KafkaException(KafkaError(KafkaError._TRANSPORT, "the exception")))


@pytest.mark.parametrize(
    ("codes", "kind", "begin", "end"),
    [
        ((), UnavailableError, "no response from Kafka at b:1: ", "nc -vz HOST PORT"),
        ((KafkaError._AUTHENTICATION,), PermissionDenied, "Kafka at b:1 rejects the authentication: ", "settings]"),
        # The last one says least.
        ((KafkaError._SSL, KafkaError._ALL_BROKERS_DOWN), UnavailableError, "TLS with Kafka at b:1 failed", "cate"),
        ((KafkaError._ALL_BROKERS_DOWN,), UnavailableError, "no response from Kafka at b:1: ", "in [kafka.settings]"),
        ((KafkaError.GROUP_AUTHORIZATION_FAILED,), UnavailableError, "Kafka at b:1: ", "the reason"),
    ],
)
def test_an_error_says_what_and_how_to_fix_it(
    codes: tuple[int, ...], kind: type[RebpfError], begin: str, end: str
) -> None:
    error = worded(*codes)
    assert type(error) is kind
    assert str(error).startswith(begin)
    assert str(error).endswith(end)


def test_a_broker_that_ends_the_tls_handshake_is_named_as_such() -> None:
    error = worded(KafkaError._TRANSPORT, text="Disconnected (after 3ms in state SSL_HANDSHAKE)")
    assert str(error).startswith("TLS with Kafka at b:1 failed: ")


def test_a_broker_that_rejects_the_clients_certificate_is_named_as_such() -> None:
    """With TLS 1.3, the client has finished the handshake before the alert arrives."""
    alert = "Receive failed: error:0A000416:SSL routines::ssl/tls alert certificate unknown: SSL alert number 46"
    error = worded(KafkaError._TRANSPORT, text=f"{alert} (after 30ms in state APIVERSION_QUERY)")
    assert str(error).startswith("TLS with Kafka at b:1 failed: ")
    assert "check ssl.certificate.location" in str(error)


def test_errors_are_logged_with_the_fix_and_each_kind_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    errors = ClientErrors("b:1", log=True)
    for _ in range(5):
        errors(KafkaError(KafkaError._TRANSPORT, "refused"))
        errors(KafkaError(KafkaError._SSL, "expired"))
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("kafka: ")
    assert "refused" in caplog.messages[0]
    assert "error=_SSL (check ssl.ca.location" in caplog.messages[1]
