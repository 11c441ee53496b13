"""Names of pods: from answers of an API server and a kubelet, and from servers that hang, refuse, page or lie."""

import json
import logging
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from producer.host import pods
from producer.host.pods import Pod, Pods, PodSource
from tests.support.rebpf import wait_until
from tests.support.servers.certificates import Authority

Reply = Callable[[BaseHTTPRequestHandler], None]

WEB = "5a1ff1fd-3c1b-4a5c-9f0e-0a3e1a7c9d01"
CRON = "5a1ff1fd-3c1b-4a5c-9f0e-0a3e1a7c9d02"
STATIC = "0c7a5bd9a7e4b7fbb1d4a63a1b0e9f55"
BARE = "5a1ff1fd-3c1b-4a5c-9f0e-0a3e1a7c9d04"
API_SERVER = {
    "kind": "PartialObjectMetadataList",
    "apiVersion": "meta.k8s.io/v1",
    "metadata": {"resourceVersion": "1042"},
    "items": [
        {
            "metadata": {
                "name": "web-6d4cf56db6-x2x7k",
                "generateName": "web-6d4cf56db6-",
                "namespace": "shop",
                "uid": WEB,
                "labels": {"app": "web", "pod-template-hash": "6d4cf56db6"},
                "ownerReferences": [
                    {
                        "apiVersion": "apps/v1",
                        "kind": "ReplicaSet",
                        "name": "web-6d4cf56db6",
                        "uid": "x",
                        "controller": True,
                    }
                ],
            }
        },
        {
            "metadata": {
                "name": "backup-29341440-8wq9z",
                "namespace": "ops",
                "uid": CRON,
                "ownerReferences": [
                    {"kind": "Other", "name": "not-in-charge", "uid": "y"},
                    {"kind": "Job", "name": "backup-29341440", "uid": "z", "controller": True},
                ],
            }
        },
        {
            "metadata": {
                "name": "kube-apiserver-node-1",
                "namespace": "kube-system",
                "uid": "5a1ff1fd-3c1b-4a5c-9f0e-0a3e1a7c9d03",
                "annotations": {"kubernetes.io/config.hash": STATIC, "kubernetes.io/config.mirror": STATIC},
                "ownerReferences": [{"kind": "Node", "name": "node-1", "uid": "n", "controller": True}],
            }
        },
        {"metadata": {"name": "debug", "namespace": "default", "uid": BARE}},
    ],
}
PODS = {
    WEB: Pod("web-6d4cf56db6-x2x7k", "shop", "Deployment/web"),
    CRON: Pod("backup-29341440-8wq9z", "ops", "Job/backup-29341440"),
    STATIC: Pod("kube-apiserver-node-1", "kube-system", None),
    BARE: Pod("debug", "default", None),
}


class Server:
    """Answers by `reply`, and records the requests."""

    def __init__(self, reply: Reply, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.gone = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.requests.append((handler.path, dict(handler.headers)))
                reply(handler)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = (
            f"http{'s' if tls else ''}://127.0.0.1:{self.server.server_address[1]}/api/v1/pods?fieldSelector=a%3Db"
        )


@contextmanager
def listing(
    tmp_path: Path, reply: Reply, *, timeout_s: float = 30, tls: ssl.SSLContext | None = None, ca: str = "ca.pem"
) -> Iterator[tuple[Pods, Server]]:
    server = Server(reply, tls)
    (tmp_path / "token").write_text("secret-token\n")
    source = PodSource(server.url, tmp_path / "token", tmp_path / ca, timeout_s)
    try:
        with Pods(source, interval_s=0.02) as found:
            yield found, server
    finally:
        server.gone.set()
        server.server.shutdown()
        server.server.server_close()


def answer(value: Any, status: int = 200) -> Reply:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def test_pods_have_their_names_namespaces_and_workloads(tmp_path: Path) -> None:
    with listing(tmp_path, answer(API_SERVER)) as (found, server):
        assert found.find(WEB) is None
        wait_until("the list", lambda: found.version)
        assert {uid: found.find(uid) for uid in PODS} == PODS
        path, headers = server.requests[0]
    assert parse_qs(urlsplit(path).query) == {"fieldSelector": ["a=b"], "limit": ["250"]}
    assert "Authorization" not in headers, "nobody on the way may read the token"
    assert "PartialObjectMetadataList" in headers["Accept"]


def test_the_list_of_a_kubelet_is_read_too(tmp_path: Path) -> None:
    """It has whole pods, no pages, and static pods under their own UID."""
    kubelet = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [{**API_SERVER["items"][0], "spec": {}}]}  # type: ignore[index]
    kubelet["items"].append({"metadata": {"name": "etcd", "namespace": "kube-system", "uid": STATIC}, "status": {}})  # type: ignore[attr-defined]
    with listing(tmp_path, answer(kubelet)) as (found, _):
        wait_until("the list", lambda: found.find(STATIC))
        assert found.find(WEB) == PODS[WEB]
        assert found.find(STATIC) == Pod("etcd", "kube-system", None)


def test_all_pages_are_read(tmp_path: Path) -> None:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        (at,) = parse_qs(urlsplit(handler.path).query).get("continue", ["0="])
        number = int(at[:-1])
        more = {"continue": f"{number + 1}="} if number < 3 else {}
        answer({"metadata": more, "items": API_SERVER["items"][number : number + 1]})(handler)  # type: ignore[index]

    with listing(tmp_path, reply) as (found, server):
        wait_until("the last page", lambda: found.find(BARE))
        assert {uid: found.find(uid) for uid in PODS} == PODS
        assert len(server.requests) == 4


def test_pages_without_end_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with listing(tmp_path, answer({"metadata": {"continue": "x"}, "items": []})) as (found, _):
        found.find(WEB)
        wait_until("the error", lambda: "expected at most 20 pages" in caplog.text)
        assert found.version == 0


@pytest.mark.parametrize("item", [[], {"a": []}, {"metadata": {}}, 0], ids=str)
def test_a_list_that_would_fill_the_memory_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, item: Any
) -> None:
    with listing(tmp_path, answer({"items": [item] * 700_000})) as (found, _):
        found.find(WEB)
        wait_until("refused", lambda: "expected at most 600000 values in a list, found" in caplog.text)


def test_the_number_of_pods_is_bounded(tmp_path: Path) -> None:
    items = [{"metadata": {"name": f"p{n}", "namespace": "n", "uid": f"u{n}"}} for n in range(pods._MOST_PODS + 100)]
    with listing(tmp_path, answer({"items": items})) as (found, _):
        wait_until("the list", lambda: found.find("u0"))
        assert found.find(f"u{pods._MOST_PODS - 1}")
        assert found.find(f"u{pods._MOST_PODS}") is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answer({"kind": "Status", "reason": "Forbidden"}, 403), "HTTP status 403"),
        (answer({}, 500), "HTTP status 500"),
        (answer(b"<html>"), "Expecting value"),
        (answer(b"[" * 100_000), "nested too deeply"),
        (answer([1]), "expected a list of pods"),
        (answer({"items": {"a": 1}}), "expected a list of pods"),
        (answer(b" " * (pods._MOST_BYTES + 1)), "longer than"),
    ],
)
def test_a_server_that_refuses_or_lies_is_logged_and_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reply: Reply, reason: str
) -> None:
    good = threading.Event()
    with listing(tmp_path, lambda handler: (answer(API_SERVER) if good.is_set() else reply)(handler)) as (found, _):
        found.find(WEB)
        wait_until("the reason", lambda: reason in caplog.text)
        assert found.version == 0
        good.set()
        wait_until("the list", lambda: found.find(WEB))
    assert "secret-token" not in caplog.text


@pytest.mark.parametrize("item", [None, 1, {}, {"metadata": 1}, {"metadata": {"uid": WEB}}, {"metadata": {"uid": 1}}])
def test_a_malformed_pod_is_left_out(tmp_path: Path, item: Any) -> None:
    odd = {"metadata": {"uid": "odd", "name": "a\nb", "namespace": "n", "ownerReferences": [1], "labels": []}}
    with listing(tmp_path, answer({"items": [item, odd, *API_SERVER["items"]]})) as (found, _):  # type: ignore[misc]
        wait_until("the list", lambda: found.find(WEB))
        assert found.find("odd") == Pod("a%0Ab", "n", None)


def test_a_server_that_hangs_delays_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()
    with listing(tmp_path, lambda handler: bool(released.wait(60)) and None, timeout_s=0.2) as (found, _):
        assert found.find(WEB) is None  # returns, though no answer ever comes
        wait_until("the deadline", lambda: "no complete response within 0.2 s" in caplog.text)
        assert found.find(WEB) is None
        released.set()


def test_a_server_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with listing(tmp_path, answer(API_SERVER)) as (_, server):
        pass
    with Pods(PodSource(server.url, tmp_path / "token", tmp_path / "ca.pem"), interval_s=0.02) as found:
        found.find(WEB)
        wait_until("the reason", lambda: "refused" in caplog.text)
    missing = PodSource(server.url.replace("http", "https"), tmp_path / "no-token", tmp_path / "ca.pem")
    with Pods(missing, interval_s=0.02) as found:
        found.find(WEB)
        wait_until("the reason", lambda: "no-token" in caplog.text)


def test_an_unknown_uid_is_not_requested_forever(tmp_path: Path) -> None:
    with listing(tmp_path, answer(API_SERVER)) as (found, server):
        found.find("unknown")
        wait_until("three lists", lambda: len(server.requests) == pods._TRIES)
        wait_until("it is given up", lambda: found.version == pods._TRIES)
        assert not found._wake.is_set()
        found.find("unknown")
        assert not found._wake.is_set()
        found.find("another")
        wait_until("it is asked for", lambda: len(server.requests) > pods._TRIES)


def test_remembered_uids_are_bounded_and_new_ones_are_still_found(tmp_path: Path) -> None:
    with listing(tmp_path, answer(API_SERVER)) as (found, _):
        for number in range(pods._MOST_WANTED + 10):
            found.find(f"unknown-{number}")
            assert len(found._wanted) <= pods._MOST_WANTED
        wait_until("they are given up", lambda: min(found._wanted.values(), default=pods._TRIES) >= pods._TRIES)
        assert found.find("one more") is None
        assert "one more" in found._wanted


@pytest.mark.parametrize("is_trusted", [True, False])
def test_only_a_server_of_the_cluster_is_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_trusted: bool
) -> None:
    ours, others = (Authority(tmp_path / name) for name in ("ours", "others"))
    server = (ours if is_trusted else others).issue("server")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server.certificate, server.key)
    (tmp_path / "ca.pem").write_bytes(ours.certificate.parent.joinpath(ours.certificate.name).read_bytes())
    caplog.set_level(logging.WARNING)
    with listing(tmp_path, answer(API_SERVER), tls=tls) as (found, reached):
        found.find(WEB)
        if is_trusted:
            wait_until("the list", lambda: found.find(WEB))
            assert reached.requests[0][1]["Authorization"] == "Bearer secret-token"
        else:
            wait_until("the reason", lambda: "certificate verify failed" in caplog.text)
            assert reached.requests == [], "the token is not sent"
