"""The sink's connection: replaced clients, its errors, and its sockets."""

import gc
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing, suppress
from pathlib import Path

import confluent_kafka.admin
import pytest

from producer.config.librdkafka import client_settings
from producer.config.load import read_secret
from producer.errors import UnavailableError
from producer.events import TRANSMITS
from producer.kafka import connection
from producer.kafka import sink as sink_module
from producer.kafka.librdkafka import Producer
from producer.kafka.sink import KafkaSink
from tests.support.mock_cluster import Cluster, lib
from tests.support.rebpf import wait_until
from tests.support.sink import BEATS, SETTINGS, TOPICS, Ledger, batch, numbered

TASKS = Path("/proc/self/task")


@pytest.mark.slow
def test_after_a_fatal_error_a_new_client_sends_what_was_not_acknowledged(cluster, open_sink, caplog):
    cluster.create("t")
    sink = open_sink()
    first, second = batch(TRANSMITS, numbered(11)), batch(TRANSMITS, numbered(13, 11))
    ledger = Ledger(sink)
    sink.send(first)
    ledger.wait_for(first)
    # A broker cannot be made to cause one; librdkafka has this function for tests.
    client = sink._connection._clients[0]
    lib.rd_kafka_test_fatal_error(client._handle, 47, b"made by a test")
    cluster.down()
    wait_until("other errors come after it", lambda: lib.rd_kafka_queue_length(client._queue) > 3)
    sink.send(second)
    ledger.wait(lambda: "replacing the client: fatal error" in caplog.text)
    cluster.up()
    ledger.wait_for(second)

    assert ledger.delivered == {"transmit": 24}
    assert not ledger.lost["transmit"]
    assert cluster.read("t", 24) == numbered(24)


def held_close(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let clients be closed only after the event is set."""
    may_close, close = threading.Event(), Producer.close

    def wait(client: Producer) -> None:
        assert may_close.wait(60), "the loop waits for the close"
        close(client)

    monkeypatch.setattr(Producer, "close", wait)
    return may_close


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssl.ca.location", "sasl.password"])
def test_a_renewed_certificate_or_secret_is_used_once_the_client_has_an_error(
    cluster, open_sink, caplog, tmp_path, name
):
    """librdkafka reads them once; when they expire, brokers would refuse it until a restart."""
    cluster.create("t")
    path = tmp_path / "file"
    path.write_text("first")
    sink = open_sink({name: str(path) if name == "ssl.ca.location" else read_secret(path, name)})
    first, second = batch(TRANSMITS, numbered(11)), batch(TRANSMITS, numbered(13, 11))
    ledger = Ledger(sink)
    sink.send(first)
    ledger.wait_for(first)
    cluster.down()
    sink.send(second)
    ledger.wait(lambda: sink.last_error)
    assert "replacing" not in caplog.text
    renewed = "replacing the client: its certificates or secrets were renewed"
    path.write_text("second")
    ledger.wait(lambda: renewed in caplog.text)
    if name == "sasl.password":
        path.unlink()  # the earlier one is used
    lib.rd_kafka_test_fatal_error(sink._connection._clients[0]._handle, 47, b"made by a test")
    ledger.wait(lambda: "replacing the client: fatal error" in caplog.text)
    cluster.up()
    ledger.wait_for(second)

    assert caplog.text.count(renewed) == 1
    assert ledger.delivered == {"transmit": 24}
    assert cluster.read("t", 24) == numbered(24)


@pytest.mark.slow
def test_a_clock_that_is_set_back_replaces_the_client_once_and_each_event_counts_once(
    cluster, open_sink, caplog, monkeypatch
):
    """librdkafka's threads wait by the system clock, and would sleep for the difference."""
    cluster.create("t")
    offset_ns, pauses_ns = [1_700_000_000_000_000_000], []
    sink = open_sink(utc_offset_ns=lambda: offset_ns[0] - (pauses_ns.pop() if pauses_ns else 0))
    first, second = batch(TRANSMITS, numbered(11)), batch(TRANSMITS, numbered(13, 11))
    ledger = Ledger(sink)
    sink.send(first)
    ledger.wait_for(first)
    for correction_ns in (-4_000_000_000, 3600_000_000_000):
        offset_ns[0] += correction_ns
        ledger.poll()
    pauses_ns.append(3_000_000_000_000)  # of the thread, between its two readings
    ledger.poll()
    assert "replacing" not in caplog.text
    cluster.down()
    sink.send(second)
    may_close = held_close(monkeypatch)
    offset_ns[0] -= 3_000_000_000_000
    for _ in range(5):
        ledger.poll()
    may_close.set()
    cluster.up()
    ledger.wait_for(second)

    assert caplog.text.count("replacing the client: the system clock was set back") == 1
    assert ledger.delivered == {"transmit": 24}
    assert not ledger.lost["transmit"]
    assert sink.in_flight == {"transmit": 0}
    assert cluster.read("t", 24) == numbered(24)


@pytest.mark.slow
def test_the_memory_of_messages_lives_until_their_client_is_closed(cluster, open_sink, monkeypatch):
    cluster.create("t")
    offset_ns = [1_700_000_000_000_000_000]
    sink = open_sink(utc_offset_ns=lambda: offset_ns[0])
    sent, ledger = batch(TRANSMITS, numbered(11)), Ledger(sink)
    payload = weakref.ref(sent.payload)
    cluster.down()
    sink.send(sent)
    may_close = held_close(monkeypatch)
    offset_ns[0] -= 3_000_000_000_000
    ledger.poll()
    cluster.up()
    ledger.wait_for(sent)
    del sent, ledger
    gc.collect()
    assert payload() is not None
    may_close.set()
    wait_until("it is released", lambda: gc.collect() is not None and payload() is None)


@pytest.mark.slow
def test_a_client_that_waits_forever_for_a_recreated_topic_is_replaced(monkeypatch, caplog):
    """The new topic's leader epoch is lower, so librdkafka ignores that another broker leads (its issue 4898)."""
    monkeypatch.setattr(sink_module, "_SILENT_S", 2.0)
    with closing(Cluster(brokers=3)) as cluster:
        cluster.create("t")
        for broker in (1, 2, 1, 2, 1):
            cluster.lead("t", 0, broker)
        with closing(KafkaSink(client_settings(cluster.brokers, SETTINGS), TOPICS)) as sink:
            sink.open()
            first, second, third = (batch(TRANSMITS, numbered(11, start)) for start in (0, 11, 22))
            ledger = Ledger(sink)
            sink.send(first)
            ledger.wait_for(first)
            cluster.delete("t")
            cluster.create("t")
            cluster.lead("t", 0, 3)
            sink.send(second)
            sink.send(third)
            ledger.wait_for(second, third)
            assert cluster.read("t", 22) == numbered(22, 11)

        assert ledger.delivered == {"transmit": 33}
        assert re.search("replacing the client: no delivery report for [234] s topic=t", caplog.text)


@pytest.mark.slow
def test_messages_that_wait_to_be_retried_replace_no_client(open_sink, monkeypatch, caplog):
    """Their topic is missing, and others share the client."""
    sink = open_sink()
    sink.send(batch(TRANSMITS, numbered(11)))
    ledger = Ledger(sink)
    ledger.wait(lambda: sink.last_error_of("transmit"))
    monkeypatch.setattr(sink, "_silent_s", 0.2)
    due_at = time.monotonic() + 0.6
    monkeypatch.setattr(sink._retries["transmit"], "_due_at", due_at)
    ledger.wait(lambda: time.monotonic() > due_at)

    assert "replacing" not in caplog.text


@pytest.mark.slow
def test_an_outage_replaces_no_client(cluster, open_sink, monkeypatch, caplog):
    """A new one would send again what has arrived, so there would be duplicates."""
    cluster.create("t")
    sink = open_sink()
    sent, ledger = batch(TRANSMITS, numbered(11)), Ledger(sink)
    cluster.down()
    sink.send(sent)
    ledger.wait(lambda: sink.last_error)
    monkeypatch.setattr(sink, "_silent_s", 0.2)
    end_at = time.monotonic() + 0.6
    ledger.wait(lambda: time.monotonic() > end_at)
    cluster.up()
    ledger.wait_for(sent)

    assert "replacing" not in caplog.text
    assert ledger.delivered == {"transmit": 11}


@pytest.mark.slow
def test_without_threads_for_a_new_client_the_old_one_stays_until_one_can_be_started(
    cluster, open_sink, monkeypatch, caplog
):
    cluster.create("t")
    offset_ns = [1_700_000_000_000_000_000]
    sink = open_sink(utc_offset_ns=lambda: offset_ns[0])

    def no_threads(*_: object) -> None:
        raise UnavailableError("the limit on processes and threads")

    with monkeypatch.context() as patched:
        patched.setattr(connection, "Producer", no_threads)
        offset_ns[0] -= 3_000_000_000_000
        sink.poll()
    old = sink._connection._clients[0]
    assert "cannot replace the client: the limit on processes and threads" in caplog.text
    wait_until("the client is replaced", lambda: sink.poll() or sink._connection._clients[0] is not old)
    first, ledger = batch(TRANSMITS, numbered(11)), Ledger(sink)
    sink.send(first)
    ledger.wait_for(first)


def test_a_client_that_waits_for_a_name_server_does_not_block_a_stop(cluster, open_sink, monkeypatch):
    sink = open_sink()
    answers = held_close(monkeypatch)
    monkeypatch.setattr(connection, "_CLOSE_S", 0.1)
    sink.close()
    answers.set()
    wait_until("it is closed", lambda: "kafka-close" not in [thread.name for thread in threading.enumerate()])


@pytest.mark.slow
def test_the_last_error_is_kept_until_a_message_is_delivered(cluster, open_sink, caplog):
    cluster.create("t")
    cluster.down()
    sink = open_sink()
    sent = batch(TRANSMITS, numbered(3))
    sink.send(sent)
    ledger = Ledger(sink)
    ledger.wait(lambda: sink.last_error)
    assert "kafka: " in caplog.text

    cluster.up()
    ledger.wait_for(sent)
    assert sink.last_error is None


def test_a_broker_that_is_down_is_logged_once(caplog):
    sink = KafkaSink(client_settings("127.0.0.1:1", {}), {})
    sink.open()
    with closing(sink):
        Ledger(sink).wait(lambda: "error=_ALL_BROKERS_DOWN" in caplog.text)
    named = [message for message in caplog.messages if "Connection refused" in message]
    assert len(named) == 1
    assert "error=_TRANSPORT" in named[0]


def test_each_socket_is_shown_before_it_connects(cluster, open_sink):
    cluster.create("t")
    seen: list[str] = []

    def look(descriptor: int) -> None:
        with socket.socket(fileno=socket.dup(descriptor)) as shown:
            try:
                seen.append(str(shown.getpeername()))
            except OSError as error:
                seen.append(type(error).__name__ if error.errno != 107 else "not connected")

    sink = open_sink(on_socket=look)
    sent = batch(TRANSMITS, numbered(3))
    sink.send(sent)
    Ledger(sink).wait_for(sent)

    assert set(seen) == {"not connected"}


@pytest.mark.parametrize("error", [OSError("no"), MemoryError()])
def test_a_socket_that_cannot_be_shown_is_not_used(cluster, open_sink, caplog, error):
    """Or its segments would be events."""

    def refuse(descriptor: int) -> None:
        raise error

    cluster.create("t")
    sink = open_sink(on_socket=refuse)
    sink.send(batch(TRANSMITS, numbered(3)))
    ledger = Ledger(sink)
    ledger.wait(lambda: "cannot open a socket" in caplog.text and sink.last_error)
    assert not ledger.delivered


def test_a_test_broker_has_the_topics():
    sink = KafkaSink(client_settings(None, {}), BEATS)
    brokers = sink.open()
    try:
        client = confluent_kafka.admin.AdminClient({"bootstrap.servers": brokers})
        topics = client.list_topics(timeout=10).topics
        assert {name: len(topic.partitions) for name, topic in topics.items()} == {"t": 4, "r": 4, "beats": 1}
    finally:
        sink.close()


def test_no_signal_interrupts_a_thread_of_the_test_broker():
    """Such as SIGHUP: the library would end the broker, and everything would be lost."""
    sink = KafkaSink(client_settings(None, {}), BEATS)
    before = {*TASKS.iterdir()}
    sink.open()
    try:
        wait_until("the broker's thread has its name", lambda: "rdk:mock" in blocked_signals(before))
        masks = blocked_signals(before)
        assert {name for name, mask in masks.items() if not mask >> (signal.SIGHUP - 1) & 1} == set()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        sink.close()


def blocked_signals(before: set[Path]) -> dict[str, int]:
    """Return the masks of blocked signals of librdkafka's threads that have been started since, by name."""
    masks = {}
    for task in {*TASKS.iterdir()} - before:
        with suppress(OSError):  # it has ended
            fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            masks[fields["Name"]] = int(fields["SigBlk"], 16)
    return {name: mask for name, mask in masks.items() if name.startswith("rdk:")}


@pytest.mark.root
def test_a_host_without_the_loopback_address_has_no_test_broker():
    """As one with IPv6 only: librdkafka would abort the process."""
    client = "from producer.kafka.librdkafka import Producer; Producer({'test.mock.num.brokers': '1'})"
    without = 'ip link set lo up && ip addr del 127.0.0.1/8 dev lo && exec "$@"'
    command = ["unshare", "--net", "sh", "-c", without, "sh", sys.executable, "-c", client]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "UnavailableError: the test broker cannot listen on 127.0.0.1: Cannot assign" in done.stderr
