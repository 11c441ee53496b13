"""The cache of downloads: a folder in it is whole, and is filled once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from tests.support.servers import fetch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REBPF_CACHE", str(tmp_path / "cache"))


def test_the_remains_of_a_failed_download_are_not_used():
    def fail(part):
        (part / "half.jar").touch()
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        fetch.cached("kafka", fail)
    folder = fetch.cached("kafka", lambda part: (part / "whole.jar").touch())

    assert [path.name for path in folder.iterdir()] == ["whole.jar"]


def test_parallel_calls_download_once(tmp_path):
    fills = []
    together, second = Barrier(8), Event()

    def fill(part):
        fills.append(part)
        if len(fills) > 1:
            second.set()
        second.wait(0.5)  # time for a second one to come in, if it can
        (part / "whole.jar").touch()

    def run(_):
        together.wait(10)
        return fetch.cached("kafka", fill)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(run, range(8)))

    assert len(fills) == 1
    assert folders == {tmp_path / "cache" / "kafka"}
    assert (tmp_path / "cache" / "kafka" / "whole.jar").exists()


def test_a_program_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert fetch.missing() == ["java", "kcat", "openssl", "setpriv", "mvn"]


def test_maven_is_not_needed_once_everything_is_there(monkeypatch, tmp_path):
    for name in (fetch.KAFKA, fetch.REGISTRY, fetch.AVRO):
        fetch.cached(name, lambda part: None)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert "mvn" not in fetch.missing()
