"""What the producer says of itself, its HTTP endpoint, and `rebpf status`."""

import contextlib
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from producer.errors import UnavailableError
from producer.health import endpoint_client
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.status import Status, table, usage
from producer.host.state import StateFolder
from tests.support.rebpf import as_nobody, let_others_in, rebpf, wait_until
from tests.support.statuses import LOST, status
from tests.support.traffic import has_ipv6

OK = status(reasons=())


@contextmanager
def loop(board: StatusBoard, make: Callable[[], Status] = status) -> Iterator[None]:
    """A loop that makes a step each 5 ms, as the producer's."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.005):
            board.step(make)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def serving(board: StatusBoard | None = None, host: str = "127.0.0.1") -> Iterator[tuple[StatusBoard, Endpoint]]:
    board = board or StatusBoard()
    with Endpoint(host, 0, board) as server:
        yield board, server


def get(url: str | None, path: str) -> tuple[int, str]:
    assert url
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_the_state_is_ok_degraded_or_stopped():
    assert [each.state for each in (OK, status(), status(stopped=True))] == ["ok", "degraded", "stopped"]


def test_losses_are_by_stage_and_reason():
    transmit, retransmit = status().as_dict()["streams"]

    assert transmit["lost"] == [
        {"stage": "kernel", "reason": "ring_full", "count": 3},
        {"stage": "kafka", "reason": "MSG_SIZE_TOO_LARGE", "count": 2},
    ]
    assert retransmit["lost"] == []


def test_usage_is_what_the_kernel_says_of_this_process():
    cpu_s, rss_bytes = usage()
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))

    ticks = os.sysconf("SC_CLK_TCK")
    assert 0 < cpu_s <= (int(stat[11]) + int(stat[12]) + 2) / ticks
    assert 1 << 20 < rss_bytes <= int(peak.split()[1]) << 10


def test_the_table_begins_with_the_state_and_why():
    lines = table(status().as_dict()).splitlines()

    assert lines[:3] == ["degraded", "  kafka: _ALL_BROKERS_DOWN", "  tcp_transmit: spooling"]
    assert lines.pop(3) == "  needs a restart: capture.transmit_ring_bytes"
    assert lines[3] == "host=höst-1 version=1.2.3 pid=4711 rules_version=7 config=0123456789abcdef cpu=1.5s rss=77.0MiB"
    assert lines[4] == "labels dc=fra-1 env=prod"
    names, transmits, retransmits = zip(*(line.split() for line in lines[5:15]), strict=True)
    assert [*names] == [
        "topic",
        "hook",
        "passed",
        "delivered",
        "in_flight",
        "spooled",
        "in_ring",
        "lost",
        "ring",
        "spool",
    ]
    assert [*transmits] == ["tcp_transmit", "fentry", "1000", "700", "200", "50", "45", "5", "25%", "3.0MiB"]
    assert [*retransmits] == ["tcp_retransmit", "raw_tp", "13", "13", "0", "0", "0", "0", "0%", "0.0MiB"]
    assert len({len(line) for line in lines[5:15]}) == 1
    assert lines[15:] == [
        "lost topic=tcp_transmit stage=kernel reason=ring_full count=3",
        "lost topic=tcp_transmit stage=kafka reason=MSG_SIZE_TOO_LARGE count=2",
    ]


def test_the_status_of_a_producer_of_an_earlier_version_is_shown_too():
    report = status().as_dict()
    del report["config_hash"], report["restart_needed"]
    assert "pid=4711 rules_version=7 cpu=1.5s" in table(report)


def test_a_user_who_cannot_read_the_state_folder_asks_at_the_endpoint(tmp_path):
    nobody = as_nobody()
    let_others_in(tmp_path)
    board = StatusBoard()
    config = tmp_path / "rebpf.toml"
    with loop(board), serving(board) as (_, server), StateFolder(tmp_path / "state") as folder:
        folder.publish({"status_url": server.url})
        config.write_text(f'[metrics]\nlisten = "{server.url.removeprefix("http://")}"\n')
        config.chmod(0o644)
        done = rebpf("status", "--config", config, "--state-dir", folder.path, before=nobody)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == table(status().as_dict()) + "\n"


def test_before_the_loop_begins_the_producer_lives_and_is_not_ready():
    with serving() as (_, server):
        assert get(server.url, "/healthz") == (200, "ok\n")
        assert get(server.url, "/readyz") == (503, '{"state": "unavailable", "reasons": ["does not capture yet"]}')
        assert get(server.url, "/status")[0] == 503
        assert get(server.url, "/metrics")[0] == 200
        assert get(server.url, "/")[0] == 404


def test_a_degraded_producer_is_ready_and_says_why():
    with serving() as (board, server), loop(board):
        wait_until("ready", lambda: get(server.url, "/readyz")[0] == 200)
        assert json.loads(get(server.url, "/readyz")[1]) == {"state": "degraded", "reasons": list(status().reasons)}
        assert json.loads(get(server.url, "/status")[1]) == status().as_dict()


def test_a_status_is_made_when_it_is_asked_for_and_only_then():
    made = []

    def make() -> Status:
        made.append(threading.get_ident())
        return status(rules_version=len(made))

    with serving() as (board, server), loop(board, make):
        wait_until("the first", lambda: made)
        steps = [json.loads(get(server.url, "/status")[1])["rules_version"] for _ in range(5)]
    assert steps == [2, 3, 4, 5, 6]
    assert len(made) == 6
    assert set(made) == {made[0]} != {threading.get_ident()}, "in the loop's own thread"


@pytest.mark.slow
def test_a_loop_that_hangs_is_seen():
    with serving(StatusBoard(hangs_after_s=1, answer_timeout_s=0.1)) as (board, server):
        with loop(board):
            wait_until("ready", lambda: get(server.url, "/readyz")[0] == 200)
        wait_until("seen", lambda: get(server.url, "/healthz")[0] == 503)
        assert get(server.url, "/readyz")[0] == get(server.url, "/status")[0] == 503
        assert "rebpf_events_passed_total" in get(server.url, "/metrics")[1]
        assert server.url
        with pytest.raises(UnavailableError, match=r"the producer has made no step for \d+\.\d s"):
            endpoint_client.ask(server.url)
        with loop(board):
            wait_until("well again", lambda: get(server.url, "/healthz")[0] == 200)


@pytest.mark.skipif(not has_ipv6(), reason="NO IPV6")
def test_it_listens_on_ipv6_too():
    with serving(host="::1") as (_, server):
        assert server.url
        assert server.url.startswith("http://[::1]:")
        assert get(server.url, "/healthz") == (200, "ok\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no such host"])
def test_a_port_that_cannot_be_bound_is_one_warning(caplog, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Endpoint(host, port, StatusBoard()) as server:
            assert server.url is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"metrics: no endpoint at {host} port {port}: ")


def test_a_port_in_use_is_served_once_it_is_free(caplog):
    """Any user can take it before a start."""
    board = StatusBoard()
    board.step(status)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = Endpoint("127.0.0.1", taken.getsockname()[1], board)
        endpoint.__enter__()
        endpoint.open()
    try:
        assert endpoint.url is None
        endpoint.open()
        assert endpoint.url
        assert get(endpoint.url, "/healthz") == (200, "ok\n")
        endpoint.open()
    finally:
        endpoint.__exit__(None, None, None)
    assert len(caplog.records) == 1


@pytest.mark.slow
def test_a_name_server_that_hangs_blocks_no_step_and_the_endpoint_opens_once_it_answers(monkeypatch, caplog):
    may_answer, board = threading.Event(), StatusBoard()
    board.step(status)

    def slow(*_):
        assert may_answer.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with Endpoint("node-1.example", 0, board) as endpoint:
        endpoint.open()
        assert endpoint.url is None
        may_answer.set()
        wait_until("the endpoint is open", lambda: endpoint.open() or endpoint.url)
    assert [record.args[-1] for record in caplog.records] == ["the name is not resolved yet"]


@pytest.fixture
def no_threads():
    usual = threading.stack_size(1 << 46)  # more than the address space
    yield
    threading.stack_size(usual)


@pytest.mark.usefixtures("no_threads")
def test_without_threads_the_endpoint_is_a_warning(caplog, tmp_path):
    with Endpoint("127.0.0.1", 0, StatusBoard()) as server:
        assert server.url is None
    with Endpoint("127.0.0.1", 0, StatusBoard()) as server:
        server._serve_at(tmp_path / "s")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert not list(tmp_path.iterdir())


def test_two_producers_do_not_share_a_port():
    with serving() as (_, first):
        assert first.url
        with Endpoint("127.0.0.1", int(first.url.rpartition(":")[2]), StatusBoard()) as second:
            assert second.url is None


def test_the_endpoint_is_closed_at_the_end():
    with serving() as (_, server):
        pass
    assert server.url
    with pytest.raises(ConnectionRefusedError):
        get(server.url, "/healthz")
    assert "endpoint" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.slow
def test_without_requests_there_are_no_wakeups():
    """The server's thread sleeps until there is a visitor."""
    code = (
        "import threading, time\n"
        "from pathlib import Path\n"
        "from producer.health.board import StatusBoard\n"
        "from producer.health.endpoint import Endpoint\n"
        "def switches():\n"
        "    (thread,) = [each for each in threading.enumerate() if each.name == 'endpoint']\n"
        "    lines = Path(f'/proc/self/task/{thread.native_id}/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('voluntary_ctxt'))\n"
        "with Endpoint('127.0.0.1', 0, StatusBoard()) as server:\n"
        "    before = -1\n"
        "    for _ in range(20):\n"
        "        if switches() == before:\n"
        "            break\n"
        "        before = switches()\n"
        "        time.sleep(1.2)\n"
        "    else:\n"
        "        print('it never sleeps for long')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@contextmanager
def running(folder: Path, url: str | None) -> Iterator[None]:
    with StateFolder(folder) as state:
        state.publish({"status_url": url})
        yield


def test_status_shows_the_health_of_the_producer(tmp_path):
    with serving() as (board, server), loop(board), running(tmp_path, server.url):
        board.step(status)
        for_people = rebpf("status", "--state-dir", tmp_path)
        as_json = rebpf("status", "--state-dir", tmp_path, "--json", env={"http_proxy": "http://127.0.0.1:1"})

    assert (for_people.returncode, for_people.stderr) == (0, ""), "degraded is no error"
    assert for_people.stdout == table(status().as_dict()) + "\n"
    assert as_json.returncode == 0
    assert json.loads(as_json.stdout) == status().as_dict()
    assert sum(loss["count"] for loss in json.loads(as_json.stdout)["streams"][0]["lost"]) == sum(LOST.values())


def test_status_without_a_producer_is_69(tmp_path):
    done = rebpf("status", "--state-dir", tmp_path)

    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == f"rebpf: no producer is running with state_dir {tmp_path}, or it is not ready yet\n"


def test_status_of_a_producer_without_an_endpoint_is_69(tmp_path):
    with running(tmp_path, None):
        done = rebpf("status", "--state-dir", tmp_path)

    assert (done.returncode, done.stdout) == (69, "")
    assert (
        done.stderr
        == f"rebpf: the producer with pid {os.getpid()} has no HTTP endpoint: set metrics.listen to a free address\n"
    )


def test_status_of_a_producer_that_does_not_answer_is_69(tmp_path):
    with serving() as (_, server):
        pass
    with running(tmp_path, server.url):
        done = rebpf("status", "--state-dir", tmp_path)

    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith(f"rebpf: the producer does not answer at {server.url}/status: ")
    assert len(done.stderr.splitlines()) == 1


DRIPS = (b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n{", b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("begin", DRIPS)
@pytest.mark.parametrize("is_local", [False, True])
def test_an_answer_that_drips_ends_at_the_deadline(tmp_path, monkeypatch, begin, is_local):
    monkeypatch.setattr(endpoint_client, "_TIMEOUT_S", 0.3)
    gone = threading.Event()
    listener = socket.socket(socket.AF_UNIX) if is_local else socket.socket()
    listener.bind(str(tmp_path / "s") if is_local else ("127.0.0.1", 0))
    listener.listen()

    def drip() -> None:
        visitor, _ = listener.accept()
        with visitor, contextlib.suppress(OSError):
            visitor.sendall(begin)
            while not gone.wait(0.02):
                visitor.sendall(b"0")
        gone.set()

    with listener:
        threading.Thread(target=drip, daemon=True).start()
        url = "http://127.0.0.1:1" if is_local else f"http://127.0.0.1:{listener.getsockname()[1]}"
        end = threading.Timer(10, gone.set)  # of a drip that nothing ends
        end.start()
        with pytest.raises(UnavailableError, match=r"no complete response within 0\.3 s"):
            endpoint_client.ask(url, tmp_path / "s" if is_local else None)
        end.cancel()


def test_a_step_costs_next_to_nothing_without_requests():
    board, made = StatusBoard(), []

    def make() -> Status:
        made.append(time.monotonic())
        return status()

    for _ in range(1000):
        board.step(make)
    assert len(made) == 1


@pytest.mark.parametrize("url", ["http://a:b", "http://[", "x", "http://", "http://\x1b[2J:1", "http://a\nb:1"])
def test_an_invalid_address_is_an_error_of_one_line(tmp_path, url):
    with pytest.raises(UnavailableError, match="the producer does not answer at") as caught:
        endpoint_client.ask(url)
    assert str(caught.value).isprintable()
