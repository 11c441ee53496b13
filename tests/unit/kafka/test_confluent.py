"""A command that waits for Kafka can be stopped."""

import os
import signal
import socket
import threading

import pytest
from confluent_kafka import Consumer, KafkaException
from confluent_kafka.admin import AdminClient

from producer.errors import Stopped
from producer.host import signals
from producer.host.signals import SignalFlag
from producer.kafka.confluent import list_topics


@pytest.mark.parametrize("kind", [Consumer, AdminClient])
def test_a_signal_ends_the_wait_for_a_broker_that_does_not_answer(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_stops", [])
    before = signal.getsignal(signal.SIGUSR2)
    with socket.create_server(("127.0.0.1", 0)) as broker:
        client = kind({"bootstrap.servers": f"127.0.0.1:{broker.getsockname()[1]}", "group.id": "g"})

        def stop_once_connected() -> None:
            with broker.accept()[0]:
                os.kill(os.getpid(), signal.SIGUSR2)
                ended.wait()

        ended = threading.Event()
        thread = threading.Thread(target=stop_once_connected)
        SignalFlag().stop_on(signal.SIGUSR2)
        try:
            thread.start()
            with pytest.raises(Stopped):
                list_topics(client, timeout_s=60)
        finally:
            ended.set()
            thread.join()
            signal.signal(signal.SIGUSR2, before)


def test_without_a_signal_the_wait_ends_after_its_time() -> None:
    with pytest.raises(KafkaException, match="_TRANSPORT"):
        list_topics(AdminClient({"bootstrap.servers": "127.0.0.1:1"}), timeout_s=1)
