"""Checks of passwords are few: what is known, malformed or too frequent takes no work."""

import base64
import threading
import time
from http import HTTPStatus

import bcrypt
import pytest

from producer.health.passwords import Passwords
from tests.support.endpoint import RIGHT, USERS, basic
from tests.support.rebpf import wait_until

HEADERS_WITHOUT_CREDENTIALS = [
    None,
    "",
    "Basic",
    "Basic ",
    "Basic \xff",
    "Basic !!!!",
    "Basic " + base64.b64encode(b"alice").decode(),
    "Basic " + base64.b64encode(b"\xff:a").decode(),
    "Basic " + base64.b64encode(b"alice:" + RIGHT.encode() + b"\0").decode(),
    "Bearer " + base64.b64encode(f"alice:{RIGHT}".encode()).decode(),
    "Digest a=b",
]


@pytest.mark.parametrize("header", HEADERS_WITHOUT_CREDENTIALS)
def test_malformed_credentials_are_refused_without_work(header: str | None) -> None:
    hashed = {"alice": USERS["alice"].replace("$04$", "$14$")}
    began = time.process_time()
    for _ in range(100):
        assert Passwords().check(hashed, header, "a") == HTTPStatus.UNAUTHORIZED
    assert time.process_time() - began < 5, "each check would take a second"


@pytest.mark.slow
def test_verified_credentials_are_not_checked_again() -> None:
    costly = {"alice": bcrypt.hashpw(b"right", bcrypt.gensalt(12)).decode()}
    passwords = Passwords()
    for password, code in (("right", HTTPStatus.OK), ("wrong", HTTPStatus.UNAUTHORIZED)):
        header = basic("alice", password)["Authorization"]
        began = time.process_time()
        for _ in range(300):
            assert passwords.check(costly, header, "a") == code
        assert time.process_time() - began < 30, "of 300 checks one: all would take a minute and more"


def test_a_password_of_more_than_72_bytes_is_cut_as_bcrypt_does() -> None:
    long = "x" * 100
    users = {"alice": bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()}
    assert Passwords().check(users, basic("alice", long)["Authorization"], "a") == HTTPStatus.OK
    assert Passwords().check(users, basic("alice", "x" * 71)["Authorization"], "a") == HTTPStatus.UNAUTHORIZED


@pytest.mark.slow
def test_many_wrong_passwords_neither_block_the_right_one_nor_occupy_a_core() -> None:
    users = {"alice": bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()}
    passwords, stop, codes = Passwords(), threading.Event(), []
    right = basic("alice", "right")["Authorization"]

    def guess(number: int) -> None:
        guesses = 0
        while not stop.is_set():
            header = basic("alice", f"{number} {guesses}")["Authorization"]
            codes.append(passwords.check(users, header, f"192.0.2.{number % 2}"))
            guesses += 1
            stop.wait(0.002)

    threads = [threading.Thread(target=guess, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    try:
        assert passwords.check(users, right, "2001:db8::1") == HTTPStatus.OK
        wait_until("guesses are refused", lambda: codes.count(HTTPStatus.UNAUTHORIZED) >= 3, 60)
        assert codes.count(HTTPStatus.TOO_MANY_REQUESTS) > codes.count(HTTPStatus.UNAUTHORIZED)
        assert passwords.check(users, right, "192.0.2.1") == HTTPStatus.OK, "known, from an address of the guesses"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert HTTPStatus.OK not in codes


def test_guesses_from_one_ipv6_network_count_as_one_visitors() -> None:
    users = {"alice": bcrypt.hashpw(b"right", bcrypt.gensalt(12)).decode()}
    passwords, codes = Passwords(), []
    ready = threading.Barrier(12)

    def guess(number: int) -> None:
        ready.wait(30)
        codes.append(passwords.check(users, basic("a", str(number))["Authorization"], f"2001:db8::{number}"))

    threads = [threading.Thread(target=guess, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(HTTPStatus.TOO_MANY_REQUESTS) > 0
