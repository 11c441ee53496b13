"""The status socket beside an endpoint that asks for certificates or passwords."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from producer.errors import UnavailableError
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.endpoint_client import ask
from tests.support.endpoint import CLIENTS, PASSWORDS, TLS, Place
from tests.support.rebpf import wait_until
from tests.support.servers.certificates import Authority, Certificate
from tests.support.statuses import status


def test_status_comes_by_the_socket_where_the_endpoint_asks_for_more(place: Place) -> None:
    with place.serving(TLS + CLIENTS + PASSWORDS):
        assert ask(place.url, place.socket)["pid"] == status().pid
    assert not place.socket.exists()


def test_only_its_owner_can_connect_to_the_socket(place: Place) -> None:
    umask = os.umask(0)
    try:
        with place.serving(PASSWORDS):
            assert stat.S_IMODE(place.socket.stat().st_mode) == 0o600
    finally:
        os.umask(umask)


@pytest.mark.slow
def test_a_request_by_the_socket_gets_what_is_wrong_with_the_file(place: Place) -> None:
    with place.serving(TLS + PASSWORDS):
        (place.folder / "web.yml").write_text("color: red")
        wait_until("seen", lambda: ask(place.url, place.socket) and place.web.last_error, 30)


def test_a_socket_that_cannot_be_found_or_is_something_else_is_not_asked(place: Place) -> None:
    with place.serving(TLS):
        place.socket.rename(place.folder / "real.sock")
        with pytest.raises(UnavailableError, match="does not answer"):
            ask(place.url, place.socket)
        place.socket.symlink_to("real.sock")
        with pytest.raises(UnavailableError, match="does not answer"):
            ask(place.url, place.socket)
        place.socket.unlink()
        place.socket.write_text("")
        with pytest.raises(UnavailableError, match="is not a socket"):
            ask(place.url, place.socket)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "socket"])
def test_anything_in_place_of_the_socket_is_removed(place: Place, kind: str) -> None:
    if kind == "folder":
        place.socket.mkdir()
        (place.socket / "mine").touch()
    elif kind == "link":
        (place.folder / "victim").write_text("as it was")
        place.socket.symlink_to("victim")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(place.socket))
    else:
        place.socket.touch()
    with place.serving(PASSWORDS):
        assert ask(place.url, place.socket)["pid"] == status().pid
    assert kind != "link" or (place.folder / "victim").read_text() == "as it was"


@pytest.mark.slow
def test_a_socket_that_cannot_be_made_at_first_is_made_later(place: Place) -> None:
    folder = place.folder / "state"
    board = StatusBoard()
    board.step(status)
    with Endpoint("127.0.0.1", 0, board, local=folder / "status.sock") as endpoint:
        assert endpoint.url
        folder.mkdir()
        endpoint.open()
        assert ask(endpoint.url, folder / "status.sock")["pid"] == status().pid
    assert not (folder / "status.sock").exists()


def test_a_socket_that_no_thread_serves_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with Endpoint("127.0.0.1", 0, StatusBoard(), local=folder / "status.sock") as endpoint:
        folder.mkdir()
        usual = threading.stack_size(1 << 46)  # more than the address space
        try:
            endpoint.open()
        finally:
            threading.stack_size(usual)
        assert not (folder / "status.sock").exists()
        (folder / "status.sock").write_text("another's")
    assert (folder / "status.sock").read_text() == "another's"


def test_a_state_folder_with_a_long_path_has_its_socket(
    tmp_path: Path, authority: Authority, server: Certificate
) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    place = Place(folder, authority, server)
    with place.serving(PASSWORDS):
        assert ask(place.url, place.socket)["pid"] == status().pid
