"""HTTP's basic authentication. bcrypt takes CPU on purpose, and who has no password must not make it take more.

What was verified once is remembered by a keyed hash, of which nobody learns the password. All else is checked one after
the other, each wrong one followed by a rest of four times what it took: wrong passwords cost a fifth of a CPU at most.
Few may wait for their turn, and one from each address, so that others' wrong passwords do not keep a right one out.
"""

import base64
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from ipaddress import ip_address

_REST = 4
_MAX_WAITING = 8
_MAX_KNOWN = 1024
_MAX_PASSWORD_BYTES = 72
"""bcrypt takes no more; its implementations cut the rest off, or refuse it."""


class Passwords:
    """Checks the passwords of visitors, in their threads. bcrypt lets the other threads run meanwhile."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        """Whether credentials are right, by their seal: right ones and wrong ones take no room from each other."""
        self._wrong: OrderedDict[bytes, bool] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._waiting: set[str] = set()
        self._rest_until = 0.0

    def check(self, users: Mapping[str, str], header: str | None, address: str) -> HTTPStatus:
        """Return OK where a request's Authorization is of one of `users`, UNAUTHORIZED where it is not.

        TOO_MANY_REQUESTS where too many wait to be checked, or one from this address does.
        """
        credentials = _credentials(header)
        if credentials is None:
            return HTTPStatus.UNAUTHORIZED
        user, password = credentials
        # Of an unknown user a known one's hash is checked, so that it takes as long.
        hashed = users.get(user) or next(iter(users.values()))
        seal = self._seal(user, hashed, password, user in users)
        with self._lock:
            if seal in self._known:
                self._known.move_to_end(seal)
                return HTTPStatus.OK
            if seal in self._wrong:
                return HTTPStatus.UNAUTHORIZED
        with self._place(_network(address)) as free:
            if not free:
                return HTTPStatus.TOO_MANY_REQUESTS
            right = self._verify(hashed, password) and user in users
        with self._lock:
            _remember(self._known if right else self._wrong, seal)
        return HTTPStatus.OK if right else HTTPStatus.UNAUTHORIZED

    def _seal(self, user: str, hashed: str, password: bytes, known: bool) -> bytes:
        parts = (user.encode(errors="replace"), hashed.encode(), password, bytes([known]))
        text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, text, "sha256")

    @contextmanager
    def _place(self, network: str) -> Iterator[bool]:
        with self._lock:
            free = network not in self._waiting and len(self._waiting) < _MAX_WAITING
            if free:
                self._waiting.add(network)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._waiting.discard(network)

    def _verify(self, hashed: str, password: bytes) -> bool:
        import bcrypt  # a producer without passwords does without its memory

        with self._turn:
            time.sleep(max(0.0, self._rest_until - time.monotonic()))
            began = time.monotonic()
            right = bcrypt.checkpw(password, hashed.encode())
            now = time.monotonic()
            if not right:
                self._rest_until = now + _REST * (now - began)
            return right


def _remember(seals: "OrderedDict[bytes, bool]", seal: bytes) -> None:
    seals[seal] = True
    if len(seals) > _MAX_KNOWN:
        seals.popitem(last=False)


def _credentials(header: str | None) -> tuple[str, bytes] | None:
    """Return the user and the password, as bcrypt takes it; None where there are none."""
    scheme, _, text = (header or "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(text.strip(), validate=True).partition(b":")
        name = user.decode()
    except ValueError:
        return None
    if not colon or b"\0" in password:  # some bcrypt would take what stands before it
        return None
    return name, password[:_MAX_PASSWORD_BYTES]


def _network(address: str) -> str:
    """Return an address; of IPv6 its /64, since who has one has them all."""
    try:
        ip = ip_address(address)
    except ValueError:
        return address
    mapped = getattr(ip, "ipv4_mapped", None)
    return str(mapped or ip) if ip.version == 4 or mapped else ip.packed[:8].hex()
