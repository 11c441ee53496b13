"""The metrics as Prometheus reads them: prometheus_client's own parsers are the readers."""

import threading
from http.client import HTTPConnection
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tenacity import Retrying, stop_after_attempt, wait_fixed

from producer.health import metrics
from producer.health.balance import stage
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.status import Status
from tests.support.statuses import status

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
TOPICS = ("tcp_transmit", "tcp_retransmit")


def scrape(of: Status | None = None, accept: str = "text/plain") -> tuple[str, str]:
    """Ask a real endpoint of a loop that has made one step; return the type and the text."""
    board = StatusBoard(answer_timeout_s=0.01)
    if of:
        board.step(lambda: of)
    with Endpoint("127.0.0.1", 0, board) as endpoint:
        assert endpoint.url
        connection = HTTPConnection(endpoint.url.removeprefix("http://"), timeout=30)
        connection.request("GET", "/metrics", headers={"Accept": accept})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
    assert response.status == 200
    return response.getheader("Content-Type") or "", text


def samples(text: str, parse: Any = parse_text) -> Samples:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in parse(text) for s in family.samples}


def of_topics(name: str, found: Samples) -> list[float]:
    return [found[name, (("topic", topic),)] for topic in TOPICS]


@pytest.fixture
def found() -> Samples:
    return samples(scrape(status())[1])


def test_each_stream_has_its_account(found):
    passed, carried = of_topics("rebpf_events_passed_total", found), of_topics("rebpf_events_carried", found)
    assert (passed, carried) == ([940, 13], [60, 0])
    assert of_topics("rebpf_events_delivered_total", found) == [700, 13]
    assert of_topics("rebpf_events_in_flight", found) == [200, 0]
    assert of_topics("rebpf_events_in_ring", found) == [45, 0]
    assert of_topics("rebpf_events_spooled", found) == [50, 0]
    assert of_topics("rebpf_ring_bytes", found) == [1 << 24, 1 << 20]
    assert of_topics("rebpf_ring_used_bytes", found) == [1 << 22, 0]
    assert of_topics("rebpf_spool_bytes", found) == [3 << 20, 0]
    assert of_topics("rebpf_spool_max_bytes", found) == [1 << 30, 1 << 28]


def test_passed_is_the_sum_of_the_balance_in_the_metrics_too(found):
    places = ["delivered_total", "in_flight", "in_ring", "spooled"]
    for topic in TOPICS:
        lost = sum(
            v for (name, labels), v in found.items() if name == "rebpf_events_lost_total" and labels[2][1] == topic
        )
        accounted = lost + sum(found[f"rebpf_events_{place}", (("topic", topic),)] for place in places)
        own = (("topic", topic),)
        assert found["rebpf_events_passed_total", own] + found["rebpf_events_carried", own] == accounted


def test_losses_are_by_stage_and_reason_and_shown_before_the_first(found):
    lost = {labels: value for (name, labels), value in found.items() if name == "rebpf_events_lost_total"}

    def of(topic: str, where: str, reason: str) -> float:
        return lost[(("reason", reason), ("stage", where), ("topic", topic))]

    assert of("tcp_transmit", "kernel", "ring_full") == 3
    assert of("tcp_transmit", "kafka", "MSG_SIZE_TOO_LARGE") == 2
    assert of("tcp_retransmit", "kernel", "ring_full") == 0
    assert of("tcp_retransmit", "spool", "spool_dropped") == 0
    assert sum(lost.values()) == 5
    zeros = [dict(labels) for labels, value in lost.items() if not value]
    assert zeros
    assert all(labels["stage"] == stage(labels["reason"]) != "kafka" for labels in zeros), "a reason that there is"


def test_the_producer_itself(found):
    assert found["rebpf_build_info", (("version", "1.2.3"),)] == 1
    assert found["rebpf_hook_info", (("hook", "fentry"), ("topic", "tcp_transmit"))] == 1
    assert found["rebpf_hook_info", (("hook", "raw_tp"), ("topic", "tcp_retransmit"))] == 1
    assert found["rebpf_site_info", (("dc", "fra-1"), ("env", "prod"))] == 1
    assert samples(scrape(status(labels={}))[1])["rebpf_site_info", ()] == 1
    assert found["rebpf_rules_version", ()] == 7
    assert found["rebpf_config_info", (("hash", "0123456789abcdef"),)] == 1
    assert found["rebpf_restart_needed", ()] == 1
    assert found["rebpf_transmit_sample_rate", ()] == 64
    assert found["rebpf_degraded", ()] == 1
    assert samples(scrape(status(reasons=()))[1])["rebpf_degraded", ()] == 0
    assert found["process_cpu_seconds_total", ()] > 0
    assert found["process_resident_memory_bytes", ()] > 1 << 20


def test_before_the_first_status_there_are_the_metrics_that_need_none():
    found = samples(scrape()[1])

    assert found["rebpf_loop_idle_seconds", ()] >= 0
    assert found["rebpf_retries_total", (("what", "kafka_send"),)] >= 0
    assert not [name for name, _ in found if name.startswith("rebpf_events_")]


def test_openmetrics_is_sent_if_asked_for():
    kind, text = scrape(status(), "application/openmetrics-text; version=1.0.0")

    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    found = samples(text, parse_openmetrics)  # which is strict about names, suffixes and buckets
    assert of_topics("rebpf_events_passed_total", found) == [940, 13]
    assert found["rebpf_hook_info", (("hook", "fentry"), ("topic", "tcp_transmit"))] == 1


def test_every_metric_has_a_type_and_says_what_it_is():
    for family in parse_text(scrape(status())[1]):
        assert family.type != "unknown", family.name
        assert family.documentation, family.name


def test_retries_count_tries_and_waits():
    def counts() -> list[float]:
        found = samples(scrape()[1])
        labels = (("what", "registry"),)
        return [found["rebpf_retries_total", labels], found["rebpf_retry_wait_seconds_total", labels]]

    before = counts()
    metrics.retried("registry", 1.5)
    assert counts() == [before[0] + 1, before[1] + 1.5]

    tries = iter([ValueError, ValueError, None])

    def work() -> None:
        error = next(tries)
        if error:
            raise error

    Retrying(
        wait=wait_fixed(0.25),
        stop=stop_after_attempt(5),
        sleep=lambda _: None,
        before_sleep=metrics.counted("registry"),
    )(work)
    assert counts() == [before[0] + 3, before[1] + 2]


def test_errors_of_kafka_are_by_name():
    labels = (("error", "NOT_ENOUGH_REPLICAS"),)
    before = samples(scrape()[1]).get(("rebpf_kafka_errors_total", labels), 0)
    metrics.kafka_error("NOT_ENOUGH_REPLICAS", 40)
    metrics.kafka_error("NOT_ENOUGH_REPLICAS")

    assert samples(scrape()[1])["rebpf_kafka_errors_total", labels] == before + 41


def buckets(found: Samples) -> list[tuple[float, float]]:
    return sorted(
        (float(dict(labels)["le"]), v) for (name, labels), v in found.items() if name == "rebpf_delivery_seconds_bucket"
    )


def test_delivery_is_a_histogram_that_takes_many_at_a_time():
    before = samples(scrape()[1])
    observed = {0.005: 3, 0.0051: 100_000, 59.0: 7, 86_400.0: 11}
    for seconds, count in observed.items():
        metrics.DELIVERY.observe(seconds, count)
    after = samples(scrape()[1])

    grown = [(bound, now - then) for (bound, now), (_, then) in zip(buckets(after), buckets(before), strict=True)]
    assert grown == [(bound, sum(n for seconds, n in observed.items() if seconds <= bound)) for bound, _ in grown]
    assert grown[0] == (0.005, 3), "a bound is part of its bucket"
    assert grown[-1] == (float("inf"), 100_021)
    assert all(one <= two for (_, one), (_, two) in pairwise(buckets(after)))
    count, total = (after[f"rebpf_delivery_seconds_{end}", ()] for end in ("count", "sum"))
    assert count == buckets(after)[-1][1]
    assert total - before["rebpf_delivery_seconds_sum", ()] == pytest.approx(sum(s * n for s, n in observed.items()))


def test_nothing_is_lost_between_threads():
    before = buckets(samples(scrape()[1]))[-1][1]
    threads = [
        threading.Thread(target=lambda: [metrics.DELIVERY.observe(0.2, 3) for _ in range(2000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buckets(samples(scrape()[1]))[-1][1] == before + 4 * 2000 * 3
