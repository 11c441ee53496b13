"""Names of Kubernetes pods by their UID, from the list of this node's pods.

The list is that of the API server (pods of a node, by a field selector) or of the kubelet (/pods). It is fetched in a
thread, only if a UID is unknown, and at most every few seconds: a server that hangs or refuses delays nothing; pods
have no names until it answers. The API server is asked for metadata only.
"""

import logging
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from urllib.request import Request

from producer.errors import Stopped
from producer.host import state_file
from producer.host.http_exchange import ExchangeError, exchange
from producer.host.log_limit import LogLimit
from producer.host.text import name as printable_name
from producer.host.text import parse_json

logger = logging.getLogger(__name__)

_ACCEPT = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, application/json"
_STATIC = ("kubernetes.io/config.mirror", "kubernetes.io/config.hash")
"""Annotations with the UID that the kubelet uses for a static pod's cgroup; the API server lists another one."""
_PAGE = 250
_MOST_PAGES = 20
_MOST_BYTES = 1 << 24
_MOST_VALUES = 600_000
"""Values in a page, at most: each can take 200 bytes of memory. Pods have hundreds."""
_MOST_PODS = 4096
_MOST_WANTED = 4096
_TRIES = 3
"""Lists without a UID after which it is unknown for good: the API server's cache may be behind."""
_INTERVAL_S = 5.0
_MOST_INTERVAL_S = 300.0
_LOG_S = 60.0


@dataclass(frozen=True, slots=True)
class Pod:
    """The fields of a pod in events."""

    name: str
    namespace: str
    workload: str | None
    """KIND/NAME of its controller, Deployment/web; None for a pod on its own."""


@dataclass(frozen=True, slots=True)
class PodSource:
    """Where the list is, and the credentials for it. The files are read for each list, since tokens expire."""

    url: str
    token: Path
    ca: Path
    timeout_s: float = 10.0


class Pods:
    """The pods of this node. `find` never waits; a thread fetches the list while entered."""

    def __init__(self, source: PodSource, *, interval_s: float = _INTERVAL_S) -> None:
        self._source = source
        self._interval_s = interval_s
        self._pods: Mapping[str, Pod] = {}
        self._wanted: dict[str, int] = {}
        """UIDs to look for, with the number of lists that lacked them."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)
        self._limit = LogLimit(_LOG_S)
        self.version = 0
        """Increases with each list."""

    def find(self, uid: str) -> Pod | None:
        """Return a pod; None if it is unknown, or not known yet: `version` increases when that may have changed."""
        pod = self._pods.get(uid)
        if pod is None:
            with self._lock:
                if len(self._wanted) >= _MOST_WANTED:  # forget those that were given up
                    self._wanted = {each: tries for each, tries in self._wanted.items() if tries < _TRIES}
                if uid not in self._wanted and len(self._wanted) < _MOST_WANTED:
                    self._wanted[uid] = 0
                    self._wake.set()
        return pod

    def __enter__(self) -> "Pods":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        wait_s = self._interval_s
        while self._wake.wait() and not self._stop.is_set():
            self._wake.clear()
            try:
                pods = dict(_fetch(self._source, self._stop))
            except Stopped:
                return
            except (ExchangeError, OSError, ValueError) as error:
                wait_s = min(wait_s * 2, _MOST_INTERVAL_S)
                self._wake.set()  # try again after the wait
                if self._limit.allows(str(error)):
                    logger.warning("pods: cannot list the pods of this node: %s", error)
            else:
                wait_s = self._interval_s
                self._take(pods)
            self._stop.wait(wait_s)

    def _take(self, pods: Mapping[str, Pod]) -> None:
        with self._lock:
            wanted = {uid: tries + 1 for uid, tries in self._wanted.items() if uid not in pods}
            # Those that were given up stay, so that they are not looked for again.
            if any(tries < _TRIES for tries in wanted.values()):
                self._wake.set()
            self._pods, self._wanted = pods, wanted
        self.version += 1


def _fetch(source: PodSource, stop: threading.Event) -> Iterator[tuple[str, Pod]]:
    """Yield the pods of all pages, by UID. Raises ExchangeError, OSError or ValueError."""
    headers = {"Accept": _ACCEPT}
    tls = None
    if source.url.startswith("https:"):  # otherwise, anyone on the path could read the token
        headers["Authorization"] = f"Bearer {_token(source.token)}"
        state_file.check_ordinary(source.ca)
        tls = ssl.create_default_context(cafile=str(source.ca))
    position = ""
    count = 0
    for _ in range(_MOST_PAGES):
        request = Request(_page(source.url, position), headers=headers)
        answer = exchange(request, source.timeout_s, tls=tls, most_bytes=_MOST_BYTES, stop=stop)
        if answer.status != 200:
            raise ExchangeError(f"HTTP status {answer.status}")
        listed, position = _listed(answer.body)
        del answer
        yield from listed[: _MOST_PODS - count]
        count += len(listed)
        if count >= _MOST_PODS or not position:
            return
    raise ValueError(f"expected at most {_MOST_PAGES} pages of pods")


def _listed(body: bytes) -> tuple[list[tuple[str, Pod]], str]:
    """Return a page's pods, by UID, and the position of the next page; empty if there is none. Raises ValueError."""
    values = sum(map(body.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES:
        raise ValueError(f"expected at most {_MOST_VALUES} values in a list, found {values}")
    listed = parse_json(body)
    if not isinstance(listed, dict) or not isinstance(items := listed.get("items"), list):
        raise ValueError("expected a list of pods")
    position = _table(listed.get("metadata")).get("continue")
    return [found for item in items for found in _pods(item)], position if isinstance(position, str) else ""


def _token(path: Path) -> str:
    state_file.check_ordinary(path)
    token = path.read_text().strip()
    if not token.isascii() or not token.isprintable():
        raise ValueError(f"{path}: expected a token")
    return token


def _page(url: str, position: str) -> str:
    parts = urlsplit(url)
    query = [*parse_qsl(parts.query), ("limit", str(_PAGE)), *([("continue", position)] if position else [])]
    return urlunsplit(parts._replace(query=urlencode(query)))


def _pods(item: Any) -> Iterator[tuple[str, Pod]]:
    """Yield a listed pod by each of its UIDs; nothing if it is malformed."""
    metadata = _table(_table(item).get("metadata"))
    uid, name, namespace = (_text(metadata.get(key)) for key in ("uid", "name", "namespace"))
    if not (uid and name and namespace):
        return
    pod = Pod(name, namespace, _workload(metadata))
    annotations = _table(metadata.get("annotations"))
    for each in {uid, *(_text(annotations.get(key)) for key in _STATIC)}:
        if each:
            yield each, pod


def _workload(metadata: Mapping[str, Any]) -> str | None:
    owners = metadata.get("ownerReferences")
    for owner in owners if isinstance(owners, list) else ():
        kind, name = (_text(_table(owner).get(key)) for key in ("kind", "name"))
        if kind and name and _table(owner).get("controller") is True and kind != "Node":  # which owns mirror pods
            template = _text(_table(metadata.get("labels")).get("pod-template-hash"))
            if kind == "ReplicaSet" and template and name.endswith(f"-{template}"):
                return f"Deployment/{name.removesuffix(f'-{template}')}"
            return f"{kind}/{name}"
    return None


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    """Return a name, printable and of the length of Kubernetes' names; None for anything else."""
    return printable_name(value.encode(errors="replace")) if isinstance(value, str) and 0 < len(value) <= 4096 else None
