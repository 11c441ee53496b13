"""The rules and the dashboard with a real Prometheus that scrapes a real endpoint by the example configuration."""

import errno
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

import bcrypt
import numpy as np
import pytest

from producer.alert.model import Counts
from producer.alert.status import AlertStatus
from producer.alert.status import registry as alert_registry
from producer.events import FLOWS, KNOWN, REASONS, ROLES, STATES
from producer.health import metrics
from producer.health.balance import Balance
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.web_config import WebSettings
from tests.support.servers.certificates import Authority
from tests.support.servers.prometheus import Prometheus, programs
from tests.support.statuses import status

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/rebpf.json").read_text())

DEADLINE_S = 60.0

# Values of Grafana's variables: no recorded rule has a window shorter than four scrapes.
VARIABLES = {"$host": ".*", "$label": "env", "$value": "prod|test", "$__rate_interval": "1m", "$__range": "1h"}
SELECTOR = re.compile(r"\b(?:(?:rebpf|process|instance:rebpf)_[\w:]+|up\b(?!\())(?:\{[^}]*\})?")
SITE = 'rebpf_site_info{job="rebpf", instance=~"$host", $label=~"$value"}'
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
MATCHING = re.compile(r"\bon\s*\(([^)]*)\)")
WORDS = {"sum", "rate", "increase", "changes", "absent", "count", "topk", "vector", "histogram_quantile"}
WORDS |= {"max", "quantile", "avg_over_time", "last_over_time", "and", "or", "unless", "offset"}


@pytest.fixture(scope="module")
def promtool() -> Callable[..., str]:
    try:
        program = programs() / "promtool"
    except LookupError as error:
        pytest.skip(str(error))

    def run(*words: str, text: str = "") -> str:
        done = subprocess.run([program, *words], cwd=RULES, input=text, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def count_tcp() -> None:
    """Count a connection that sent 1,000 segments, 10 of them retransmitted, and one that was refused."""
    rows = np.zeros(2, FLOWS.dtype)
    rows["flow"]["sk_cookie"] = time.monotonic_ns(), 1
    rows["start_ns"] = rows["ts"] = time.monotonic_ns()
    rows["reason"], rows["role"] = REASONS.index("close"), ROLES.index("client")
    rows["state"] = STATES.index("ESTABLISHED"), STATES.index("SYN_SENT")
    rows["known"], rows["error"] = (KNOWN["tcp"], KNOWN["error"]), (0, errno.ECONNREFUSED)
    rows["segs_out"], rows["retrans_rto"], rows["srtt_us"] = (1000, 1), (10, 0), (700, 0)
    count = metrics.TCP.counter(FLOWS)
    assert count
    count(rows)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[tuple[StatusBoard, str]]:
    """An endpoint with all metrics, including those that appear with the first error."""
    metrics.kafka_error("_ALL_BROKERS_DOWN")
    metrics.DELIVERY.observe(0.2, 100)
    count_tcp()
    board = StatusBoard(answer_timeout_s=0.01)
    board.step(status)
    with Endpoint("127.0.0.1", 0, board) as served:
        assert served.url
        yield board, served.url


def test_prometheus_scrapes_an_endpoint_with_tls_a_client_certificate_and_a_password(
    promtool: Callable[..., str], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("prometheus")
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (tmp_path / "web.yml").write_text(
        f"tls_server_config: {{cert_file: {server.certificate}, key_file: {server.key},\n"
        "  client_ca_file: authority.pem,"
        "  client_auth_type: RequireAndVerifyClientCert}\n"
        f"basic_auth_users: {{prometheus: {hashed}}}\n"
    )
    promtool("check", "web-config", str(tmp_path / "web.yml"))
    board = StatusBoard(answer_timeout_s=0.01)
    board.step(status)
    with Endpoint("127.0.0.1", 0, board, WebSettings(tmp_path / "web.yml")) as served:
        assert served.url
        jobs = "".join(
            f"""
- job_name: {name}
  scheme: https
  scrape_interval: 1s
  basic_auth: {{username: prometheus, password: {password}}}
  tls_config: {{ca_file: {authority.certificate}, cert_file: {client.certificate}, key_file: {client.key}}}
  static_configs: [{{targets: ["{served.url.removeprefix("https://")}"]}}]"""
            for name, password in (("right", "secret"), ("wrong", "guess"))
        )
        (tmp_path / "prometheus.yml").write_text(f"scrape_configs:{jobs}\n")
        with Prometheus(tmp_path, tmp_path / "prometheus.yml") as scraper:
            wait_for(lambda: scraper.query('rebpf_events_passed_total{job="right"}'))
            wait_for(lambda: scraper.query('up{job="wrong"} == 0'))
            assert scraper.query('rebpf_events_passed_total{job="wrong"}') == []


@pytest.fixture(scope="module")
def alert_url() -> Iterator[str]:
    """URL of the endpoint of an active member of `rebpf alert`."""
    member = AlertStatus(is_active=True, lag_s=1.5, lag_messages=3, firing=1, counts=Counts())
    board = StatusBoard(answer_timeout_s=0.01)
    with Endpoint("127.0.0.1", 0, board, registry=alert_registry(lambda: member)) as served:
        assert served.url
        yield served.url


@pytest.fixture(scope="module")
def prometheus(
    promtool: Callable[..., str],
    endpoint: tuple[StatusBoard, str],
    alert_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the endpoints twice, with events in between, and evaluated the rules."""
    board, url = endpoint
    folder = tmp_path_factory.mktemp("prometheus")
    config = (RULES / "prometheus.yml").read_text()
    targets = {"localhost:9465": url, "localhost:9466": alert_url}
    for said, here in ({said: here.removeprefix("http://") for said, here in targets.items()} | {"15s": "1s"}).items():
        assert said in config
        config = config.replace(said, here)
    (folder / "prometheus.yml").write_text(config)
    (folder / "rebpf.rules.yml").write_text((RULES / "rebpf.rules.yml").read_text())
    with Prometheus(folder, folder / "prometheus.yml") as server:
        wait_for(lambda: server.query("rebpf_events_passed_total"))
        metrics.DELIVERY.observe(0.2, 100)
        count_tcp()
        first = status()
        more = (replace(stream, balance=Balance(5000, 5000)) for stream in first.streams)
        board.publish(status(streams=tuple(more)))
        wait_for(lambda: server.query("instance:rebpf_tcp_retransmitted_segments:ratio_rate5m"))
        wait_for(lambda: server.query("increase(rebpf_delivery_seconds_count[1m]) > 0"))
        yield server


def wait_for(
    condition: Callable[[], T],
    otherwise: str = "Prometheus has not scraped the endpoint and evaluated the rules in time",
) -> T:
    deadline = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)
    return result


@pytest.fixture(scope="module")
def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    """The rules as loaded by Prometheus."""
    found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(re.findall(r"^ +- (?:alert|record): ", (RULES / "rebpf.rules.yml").read_text(), re.M))
    return found


def targets() -> Iterator[tuple[dict[str, Any], str, str]]:
    """The dashboard's queries: panel, expression with Grafana's variables replaced, legend."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            yield panel, expression, target.get("legendFormat", "")


def unknown_words(expression: str) -> set[str]:
    """Words that are neither recognized selectors nor known PromQL."""
    rest = re.sub(r"\[[^]]*\]|\boffset \w+", "", GROUPING.sub("", SELECTOR.sub("", expression)))
    return set(re.findall(r"[A-Za-z_]\w*", rest)) - WORDS


def assert_exists(prometheus: Prometheus, expression: str) -> set[str]:
    """Check that every selector has a series with the labels of the expression's grouping; return all labels.

    The labels of the site only select: of these, series need those that are matched.
    """
    assert not unknown_words(expression), expression
    selectors = SELECTOR.findall(expression)
    assert selectors, expression
    grouped, matched = (
        {label.strip() for labels in words.findall(expression) for label in labels.split(",")}
        for words in (GROUPING, MATCHING)
    )
    seen = set()
    for selector in selectors:
        needed = matched if selector.startswith("rebpf_site_info") else grouped
        # Everything scraped, not only current series.
        series = prometheus.get("series", **{"match[]": selector})
        assert series, f"nothing is exposed for {selector}, in {expression}"
        for labels in series:
            assert needed <= labels.keys(), f"{selector} has no such label: {needed - labels.keys()}"
            seen |= labels.keys()
    return seen


def test_promtool_finds_nothing_wrong_with_rules_and_config(promtool):
    promtool("check", "rules", "rebpf.rules.yml")
    promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_where_it_should_and_not_where_it_should_not(promtool):
    promtool("test", "rules", "rebpf.rules.test.yml")
    text = (RULES / "rebpf.rules.test.yml").read_text()
    for alert in re.findall(r"- alert: (\w+)", (RULES / "rebpf.rules.yml").read_text()):
        assert f'ALERTS{{alertname="{alert}", alertstate="firing"' in text, alert


def test_promtool_finds_nothing_wrong_with_the_metrics(promtool, endpoint):
    with urlopen(endpoint[1] + "/metrics", timeout=30) as answer:
        said = promtool("check", "metrics", text=answer.read().decode())
    assert not said.strip()


def test_the_example_config_names_hosts_without_ports(prometheus):
    up = wait_for(lambda: prometheus.query('up{job="rebpf"} == 1'))
    assert {series["instance"] for series in up} == {"127.0.0.1"}


def test_every_metric_in_the_rules_is_exposed(prometheus, rules):
    for rule in rules:
        labels = assert_exists(prometheus, rule["query"])
        for text in rule.get("annotations", {}).values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels, text


def test_every_metric_on_the_dashboard_is_exposed_and_every_query_has_an_answer(prometheus):
    for panel, expression, legend in targets():
        title = panel["title"]
        assert_exists(prometheus, expression)
        try:
            # A late scrape can leave a short gap.
            series = wait_for(partial(prometheus.query, expression), f"no answer: {title}: {expression}")
        except HTTPError as error:
            pytest.fail(f"{title}: {expression}: {error.read().decode()}")
        for labels in series:
            assert set(re.findall(r"{{(\w+)}}", legend)) <= labels.keys(), f"{title}: {legend}"
            assert panel["type"] == "table" or "instance" not in labels, f"{title} draws a line for each host"
        assert panel["type"] != "table" or expression.startswith("topk(20, "), f"{title} has a row for each host"


def test_the_shares_on_the_dashboard_are_those_of_segments_and_of_connects(prometheus):
    for title, expected in (("Retransmitted", 0.01), ("Failed connects", 0.5)):
        (expression,) = (each for panel, each, _ in targets() if panel["title"] == title)
        (result,) = wait_for(lambda: prometheus.get("query", query=expression)["result"])  # noqa: B023
        assert float(result["value"][1]) == pytest.approx(expected, rel=0.01), title


def test_a_name_that_is_not_exposed_is_found(prometheus):
    for wrong in ("rebpf_event_passed_total", 'rebpf_hook_info{hock="x"}', "sum by (host) (rebpf_ring_bytes)"):
        with pytest.raises(AssertionError):
            assert_exists(prometheus, wrong)
    assert unknown_words("node_load1 > 1") == {"node_load1"}


def test_every_alert_says_what_it_is_and_names_a_section_that_there_is(rules):
    for alert in (rule for rule in rules if rule["type"] == "alerting"):
        assert {"summary", "description", "runbook_url"} <= alert["annotations"].keys(), alert["name"]
        page, _, section = (
            alert["annotations"]["runbook_url"].removeprefix("https://docs.rebpf.example/").partition("#")
        )
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(), re.M)
        assert section in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, alert["name"]
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}


def test_the_dashboard_is_for_any_data_source_and_host():
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "label", "value", "host"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            selectors = SELECTOR.findall(target["expr"])
            assert all('job="rebpf", instance=~"$host"' in each for each in selectors), target["expr"]
            assert SITE in target["expr"]


def test_no_panel_lies_over_another():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
