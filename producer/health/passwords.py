"""HTTP basic authentication. bcrypt is slow on purpose, so attackers must not be able to waste CPU with it.

Verified credentials are cached by a keyed hash, which does not reveal the password. All others are checked one by one.
A wrong one is followed by a pause of four times its duration, so wrong passwords take at most a fifth of a CPU. Only a
few visitors can wait for a check, and one per address, so that wrong passwords from others do not block a right one.
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

_PAUSE_FACTOR = 4
_MAX_WAITING = 8
_MAX_CACHED = 1024
_MAX_PASSWORD_BYTES = 72
"""bcrypt's limit; implementations truncate or reject longer ones."""


class Passwords:
    """Checks passwords in the visitors' threads. bcrypt releases the GIL."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, bool] = OrderedDict()
        """Verified credentials by their keyed hash; separate from wrong ones, so that those cannot evict them."""
        self._wrong: OrderedDict[bytes, bool] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._waiting: set[str] = set()
        self._pause_until = 0.0

    def check(self, users: Mapping[str, str], header: str | None, address: str) -> HTTPStatus:
        """Return OK if the Authorization header is right for one of `users`, otherwise UNAUTHORIZED.

        TOO_MANY_REQUESTS if too many checks are waiting, or one for this address.
        """
        credentials = _credentials(header)
        if credentials is None:
            return HTTPStatus.UNAUTHORIZED
        user, password = credentials
        # For an unknown user, check the hash of a known one, to take the same time.
        hashed = users.get(user) or next(iter(users.values()))
        seal = self._seal(user, hashed, password, user in users)
        with self._lock:
            if seal in self._verified:
                self._verified.move_to_end(seal)
                return HTTPStatus.OK
            if seal in self._wrong:
                return HTTPStatus.UNAUTHORIZED
        with self._slot(_network(address)) as free:
            if not free:
                return HTTPStatus.TOO_MANY_REQUESTS
            right = self._verify(hashed, password) and user in users
        with self._lock:
            _remember(self._verified if right else self._wrong, seal)
        return HTTPStatus.OK if right else HTTPStatus.UNAUTHORIZED

    def _seal(self, user: str, hashed: str, password: bytes, known: bool) -> bytes:
        parts = (user.encode(errors="replace"), hashed.encode(), password, bytes([known]))
        text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, text, "sha256")

    @contextmanager
    def _slot(self, network: str) -> Iterator[bool]:
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
        import bcrypt  # imported only if needed, to save memory

        with self._turn:
            time.sleep(max(0.0, self._pause_until - time.monotonic()))
            began = time.monotonic()
            right = bcrypt.checkpw(password, hashed.encode())
            now = time.monotonic()
            if not right:
                self._pause_until = now + _PAUSE_FACTOR * (now - began)
            return right


def _remember(seals: "OrderedDict[bytes, bool]", seal: bytes) -> None:
    seals[seal] = True
    if len(seals) > _MAX_CACHED:
        seals.popitem(last=False)


def _credentials(header: str | None) -> tuple[str, bytes] | None:
    """Return the user and the password, truncated as bcrypt does; None if the header has none."""
    scheme, _, text = (header or "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(text.strip(), validate=True).partition(b":")
        name = user.decode()
    except ValueError:
        return None
    if not colon or b"\0" in password:  # some implementations of bcrypt stop there
        return None
    return name, password[:_MAX_PASSWORD_BYTES]


def _network(address: str) -> str:
    """Return an IPv4 address, or the /64 of an IPv6 address, which is usually one client."""
    try:
        ip = ip_address(address)
    except ValueError:
        return address
    mapped = getattr(ip, "ipv4_mapped", None)
    return str(mapped or ip) if ip.version == 4 or mapped else ip.packed[:8].hex()
