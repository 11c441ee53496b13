"""The sink against librdkafka's mock cluster: acknowledgements, retries, losses, and limits in flight."""

import re
import subprocess
import sys
import time
from collections import Counter

import pytest

from producer.config.librdkafka import client_settings
from producer.events import HEARTBEATS, RETRANSMITS, TRANSMITS, EncodedBatch
from producer.kafka import librdkafka
from producer.kafka.sink import KafkaSink
from tests.support.garbling_proxy import GarblingProxy
from tests.support.rebpf import DEADLINE_S
from tests.support.sink import BEATS, SETTINGS, TOPICS, Ledger, batch, messages_of, numbered

pytestmark = pytest.mark.slow


def test_keys_and_values_arrive_as_they_lie_in_the_batch_and_each_key_in_order(cluster, open_sink):
    cluster.create("t", 4)
    sink = open_sink()
    first, second = numbered(307), numbered(211, 307)
    batches = [batch(TRANSMITS, first), batch(TRANSMITS, second)]
    for each in batches:
        sink.send(each)
    ledger = Ledger(sink)
    ledger.wait_for(*batches)

    assert ledger.delivered == {"transmit": 518}
    read = cluster.read("t", 518)
    for key in {key for key, _ in first}:
        assert [value for k, value in read if k == key] == [value for k, value in first + second if k == key]


def test_a_message_that_is_too_large_for_the_client_is_lost_by_name_and_its_neighbors_arrive(cluster, open_sink):
    cluster.create("t")
    sink = open_sink({"message.max.bytes": "1000"})
    messages = numbered(11)
    messages[5] = (b"key", bytes(5000))
    sent = batch(TRANSMITS, messages)
    sink.send(sent)
    ledger = Ledger(sink)
    ledger.wait_for(sent)

    assert ledger.delivered == {"transmit": 10}
    assert ledger.lost["transmit"] == {"MSG_SIZE_TOO_LARGE": 1}
    assert cluster.read("t", 10) == messages[:5] + messages[6:]


@pytest.mark.parametrize("code", [7, 19, 29, 3, 6, 17, 32, 35, 74, 76, 9999], ids=librdkafka.error_name)
def test_a_temporary_failure_costs_no_message(cluster, open_sink, code):
    cluster.create("t")
    sink = open_sink()
    cluster.answer_produce_with(code, code, code)
    messages = numbered(101)
    sent = batch(TRANSMITS, messages)
    sink.send(sent)
    ledger = Ledger(sink)
    ledger.wait_for(sent)

    assert ledger.delivered == {"transmit": 101}
    assert not ledger.lost["transmit"]
    assert set(cluster.read("t", 101)) == set(messages)


def test_garbled_answers_of_a_broker_cost_no_message(cluster):
    """The broker has taken the messages of such an answer, so there are duplicates."""
    cluster.create("t")
    messages = numbered(101)
    sent = batch(TRANSMITS, messages)
    with GarblingProxy(cluster.brokers, 5) as proxy:
        sink = KafkaSink(client_settings(proxy.address, SETTINGS), TOPICS)
        sink.open()
        try:
            sink.send(sent)
            ledger = Ledger(sink)
            ledger.wait_for(sent)
        finally:
            sink.close()
        assert proxy.left == 0

    assert ledger.delivered == {"transmit": 101}
    assert not ledger.lost["transmit"]
    assert set(cluster.read("t", 101)) == set(messages)


def test_retried_batches_stay_in_order_and_later_ones_wait_for_them(cluster, open_sink, caplog):
    """The topic is missing. The client's queue takes two and a half batches and rejects more before these fail."""
    sink = open_sink(raw={"queue.buffering.max.messages": "50"})
    batches = [batch(TRANSMITS, numbered(20, start)) for start in range(0, 240, 20)]
    failing, later = batches[:8], batches[8:]
    for each in failing:
        sink.send(each)
    ledger = Ledger(sink)
    # All have failed, were retried, and failed again.
    ledger.wait(
        lambda: (
            caplog.text.count("retrying messages topic=t error=") > 1 and "UNKNOWN" in sink.last_error_of("transmit")
        )
    )

    assert not sink.last_error_of("retransmit")
    assert (sink.capacity(TRANSMITS), sink.capacity(RETRANSMITS)) == (0, 1 << 15)
    assert [sink.unacknowledged(each) for each in batches] == [20] * 8 + [0] * 4
    cluster.create("t")
    ledger.wait(lambda: sink.capacity(TRANSMITS))
    for each in later:
        sink.send(each)
    ledger.wait_for(*batches)

    assert ledger.delivered == {"transmit": 240}
    assert [sink.unacknowledged(each) for each in batches] == [0] * 12
    assert not sink.last_error_of("transmit")
    assert cluster.read("t", 240) == numbered(240)


@pytest.mark.parametrize("code", [10, 44, 87], ids=librdkafka.error_name)
def test_a_rejected_batch_is_retried_one_by_one_and_messages_rejected_again_are_lost_by_name(cluster, open_sink, code):
    cluster.create("t")
    kept: list[tuple[EncodedBatch, str]] = []
    sink = open_sink(quarantine=lambda refused, error: kept.append((refused, error)))
    # The whole batch, then its first two messages, each in a separate request.
    cluster.answer_produce_with(code, code, code)
    refused, later = batch(TRANSMITS, numbered(13)), batch(TRANSMITS, numbered(17, 13))
    ledger = Ledger(sink)
    sink.send(refused)
    ledger.wait_for(refused)
    sink.send(later)
    ledger.wait_for(later)

    name = librdkafka.error_name(code)
    assert ledger.lost["transmit"] == {name: 2}
    assert ledger.lost_of == {refused: Counter({name: 2}), later: Counter()}
    assert ledger.delivered == {"transmit": 11 + 17}
    assert cluster.read("t", 28) == [*numbered(11, 2), *numbered(17, 13)]
    assert [each for messages, _ in kept for each in messages_of(messages)] == numbered(2)
    assert {(messages.stream, error) for messages, error in kept} == {(TRANSMITS, name)}


def test_nothing_overtakes_messages_that_are_sent_one_by_one(cluster, open_sink):
    cluster.create("t")
    sink = open_sink()
    cluster.slow_down(50)
    cluster.answer_produce_with(87)
    refused = batch(TRANSMITS, numbered(13))
    ledger = Ledger(sink)
    sink.send(refused)
    ledger.wait(lambda: sink.capacity(TRANSMITS) == 0)
    assert 0 < sink.unacknowledged(refused) <= 13
    ledger.wait(lambda: sink.capacity(TRANSMITS))
    assert sink.unacknowledged(refused) == 0
    sent = batch(TRANSMITS, numbered(7, 13))
    sink.send(sent)
    ledger.wait_for(sent)

    assert cluster.read("t", 20) == numbered(20)


def beat(text: bytes) -> EncodedBatch:
    return EncodedBatch.of(HEARTBEATS, b"host", text)


def test_a_heartbeat_is_a_batch_of_one_message_and_is_reported_like_others(cluster, open_sink):
    cluster.create("beats")
    sink = open_sink(topics=BEATS)
    ledger = Ledger(sink)
    for number in range(3):
        sent = beat(b"beat %d" % number)
        sink.send(sent)
        assert sink.in_flight["heartbeat"] == sink.unacknowledged(sent) == 1
        ledger.wait_for(sent)

    assert sink.in_flight["heartbeat"] == 0
    assert ledger.delivered == {"heartbeat": 3}
    assert cluster.read("beats", 3) == [(b"host", b"beat %d" % number) for number in range(3)]


def test_a_missing_heartbeat_topic_is_logged_and_retried_rarely_and_costs_no_event(cluster, open_sink, caplog):
    cluster.create("t")
    sink = open_sink(topics=BEATS)
    ledger = Ledger(sink)
    first = beat(b"first")
    sink.send(first)
    ledger.wait(lambda: "retrying messages topic=beats error=" in caplog.text)
    wait_s = float(re.search(r"topic=beats error=\w+ wait_s=([\d.]+)", caplog.text)[1])
    assert sink.last_error_of("heartbeat")
    assert (sink.in_flight["heartbeat"], sink.capacity(HEARTBEATS)) == (1, 0)
    sent = batch(TRANSMITS, numbered(11))
    sink.send(sent)
    ledger.wait_for(sent)
    end = time.monotonic() + min(4.0, wait_s)
    while time.monotonic() < end:
        ledger.poll()
        time.sleep(0.01)

    assert ledger.delivered == {"transmit": 11}
    # Waits are random, up to 20 s and more: 5 within this time are practically impossible.
    assert caplog.text.count("topic=beats") < 5
    assert sink.in_flight["heartbeat"] == 1  # it may have been retried just now
    assert (sink.last_error_of("transmit"), sink.capacity(TRANSMITS)) == ("", 1 << 15)


def test_reports_are_processed_although_something_fails_meanwhile(cluster, open_sink):
    """What was taken from librdkafka does not come again: a report that is forgotten keeps the ring full for good."""
    cluster.create("t")

    def fail(refused: EncodedBatch, error: str) -> None:
        raise MemoryError("no room to store it")

    sink = open_sink({"message.max.bytes": "1000"}, quarantine=fail)
    messages = numbered(31)
    for row in (3, 5, 11):
        messages[row] = (b"key", bytes(5000))
    sent = [batch(TRANSMITS, messages), batch(TRANSMITS, numbered(7, 31))]
    for each in sent:
        sink.send(each)
    ledger = Ledger(sink)
    failures = 0
    end = time.monotonic() + DEADLINE_S
    while len(ledger.done) < 2:
        assert time.monotonic() < end, (sink.in_flight, ledger.delivered, ledger.lost)
        try:
            ledger.poll()
        except MemoryError:
            failures += 1
        time.sleep(0.005)

    assert failures > 0
    assert ledger.delivered == {"transmit": 28 + 7}
    assert ledger.lost["transmit"] == {"MSG_SIZE_TOO_LARGE": 3}
    assert sink.in_flight == {"transmit": 0}
    assert sink.capacity(TRANSMITS) == 1 << 15


def test_each_stream_has_its_own_capacity_which_the_reports_restore(cluster, open_sink):
    cluster.create("t")
    cluster.create("r")
    sink = open_sink(max_in_flight=100)
    cluster.down()
    sent = batch(TRANSMITS, numbered(60))
    sink.send(sent)

    assert (sink.capacity(TRANSMITS), sink.capacity(RETRANSMITS)) == (40, 100)
    cluster.up()
    Ledger(sink).wait_for(sent)
    assert (sink.capacity(TRANSMITS), sink.capacity(RETRANSMITS)) == (100, 100)


def test_a_missing_topic_does_not_delay_the_other_stream(cluster, open_sink, caplog):
    cluster.create("r")
    sink = open_sink(max_in_flight=100)
    held = batch(TRANSMITS, numbered(100))
    sink.send(held)
    ledger = Ledger(sink)
    ledger.wait(lambda: "topic=t error=" in caplog.text)
    assert sink.capacity(TRANSMITS) == 0
    for start in range(0, 500, 100):
        assert sink.capacity(RETRANSMITS) == 100
        sent = batch(RETRANSMITS, numbered(100, start))
        sink.send(sent)
        ledger.wait_for(sent)
    assert (ledger.delivered["transmit"], ledger.delivered["retransmit"]) == (0, 500)

    cluster.create("t")
    ledger.wait_for(held)
    assert ledger.delivered == {"retransmit": 500, "transmit": 100}
    assert not ledger.lost["transmit"]


def test_warnings_of_a_missing_topic_become_rare_though_the_other_streams_messages_arrive(cluster, open_sink, caplog):
    cluster.create("t")
    sink = open_sink()
    sink.send(batch(RETRANSMITS, numbered(3)))
    ledger = Ledger(sink)
    ledger.wait(lambda: "topic=r error=" in caplog.text)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        sent = batch(TRANSMITS, numbered(1))
        sink.send(sent)
        ledger.wait_for(sent)

    # Waits of up to 0.5, 1, 2, 4 s: 10 within 4 s are practically impossible; waits up to 0.5 s would give 16.
    assert caplog.text.count("topic=r error=") < 10


def test_spilling_needs_no_new_module() -> None:
    """numpy imports some submodules on first use, which fails when descriptors have run out."""
    program = """
import resource
from producer.events import TRANSMITS, EncodedBatch
from producer.spool.format import Spooled, block
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 4096))
block(Spooled(EncodedBatch.of(TRANSMITS, b"key", bytes(9)), 0, "", 0, ""), bytes(16))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
