"""TLS, passwords and headers of the HTTP endpoint, from a file in the format of Prometheus exporters (web.config.file).

The file, its certificates and its keys are read again when they change; an invalid change leaves the current settings
in force. OpenSSL loads certificates from files only, so it gets their text in memory files: no path is opened twice.

Unknown keys and unsupported features are errors: a start that fails is better than an elliptic curve that is silently
ignored.
"""

import contextlib
import hashlib
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from producer.config.convert import nearest
from producer.config.sources import read_bytes
from producer.config.yaml_table import Table, mapping
from producer.errors import ConfigError
from producer.host.text import printable

logger = logging.getLogger(__name__)

WHERE = "metrics.web_config_file"
_MAX_BYTES = 1 << 17
_READ_INTERVAL_S = 1.0
_READ_SHARE = 20  # reading takes at most 1/20 of the time
_NOT_ENCRYPTED = "the key is encrypted: expected one without a passphrase"

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_OLD_VERSIONS = ("TLS10", "TLS11")
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_UNVERIFIED = ("RequestClientCert", "RequireAnyClientCert", "RequireClientCert")
_TLS13_SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
_SUITES = {
    f"TLS_ECDHE_{key}_WITH_{name}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for name, openssl in (
        ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    )
}
_HEADERS: Mapping[str, tuple[str, ...]] = {
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
    "Content-Security-Policy": (),
}
_TLS_KEYS = (
    *("cert", "cert_file", "key", "key_file", "client_ca", "client_ca_file", "client_auth_type", "client_allowed_sans"),
    *("min_version", "max_version", "cipher_suites", "prefer_server_cipher_suites", "curve_preferences"),
)
_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_COSTS = range(4, 15)  # 14 takes over a second of CPU, and a visit lasts at most five


@dataclass(frozen=True, slots=True)
class WebConfig:
    """The content of a file. Without `tls`, the endpoint uses plain HTTP; without `users`, it needs no password."""

    tls: ssl.SSLContext | None = None
    sans: frozenset[str] = frozenset()
    """Names, one of which the client certificate must have; empty: any certificate."""
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """bcrypt hashes of the passwords, by user."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def admits(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether a client with this verified certificate may connect."""
        names = (certificate or {}).get("subjectAltName", ())
        return not self.sans or any(_san(name) in self.sans for _, name in names)


class WebSettings:
    """The settings in force, from the file at `path`. Raises ConfigError if its first read fails."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._reading = threading.Lock()
        self._config = WebConfig()
        self._digest = b""
        self.last_error: str | None = None
        """Why the current content of the file is not in force; None if it is."""
        if path:
            source = _Source(path)
            self._config, self._digest = source.parse(), source.digest()
        self._next = clock() + _READ_INTERVAL_S

    def current(self) -> WebConfig:
        """Return the settings in force; check the files for changes at most once a second."""
        # If the disk hangs, only one visitor waits.
        if self._path and self._clock() >= self._next and self._reading.acquire(blocking=False):
            began = self._clock()
            try:
                self._look(self._path)
            finally:
                now = self._clock()
                self._next = now + max(_READ_INTERVAL_S, _READ_SHARE * (now - began))
                self._reading.release()
        return self._config

    def _look(self, path: Path) -> None:
        source = _Source(path)
        error_text = None
        try:
            fresh = source.parse()
            digest = source.digest()
            if digest != self._digest:
                _check_change(path, self._config, fresh)
                self._config, self._digest = fresh, digest
                logger.info("metrics: reloaded %s", path)
        except ConfigError as error:
            error_text = str(error)
        if error_text and error_text != self.last_error:
            logger.warning("%s: the previous settings stay in force", error_text)
        self.last_error = error_text


def _check_change(path: Path, old: WebConfig, new: WebConfig) -> None:
    """Reject changes that remove protection: a file that is being written may be empty for a moment."""
    for what, before, after in (
        ("TLS", old.tls, new.tls),
        ("passwords", old.users, new.users),
        ("client certificates", _verifies(old), _verifies(new)),
        ("client_allowed_sans", old.sans, new.sans),
    ):
        if before and not after:
            raise ConfigError(f"{WHERE}: {path}: {what} cannot be turned off without a restart")
    if new.tls and not old.tls:
        raise ConfigError(f"{WHERE}: {path}: TLS cannot be turned on without a restart")


def _verifies(config: WebConfig) -> bool:
    return config.tls is not None and config.tls.verify_mode == ssl.CERT_REQUIRED


class _Source:
    """A file and the files that it names, each read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts: dict[Path, bytes] = {}

    def digest(self) -> bytes:
        """Return a digest of all content read."""
        parts = [hashlib.sha256(part).digest() for path, text in self._texts.items() for part in (bytes(path), text)]
        return hashlib.sha256(b"".join(parts)).digest()

    def parse(self) -> WebConfig:
        """Return the content of the file. Raises ConfigError."""
        top = Table("", self._mapping(), self._error)
        top.check_keys("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
        if "rate_limit" in top.values:
            raise self._error(
                "rate_limit", "not supported: the endpoint always limits the number and duration of visits"
            )
        tls = top.table("tls_server_config")
        context, sans = (self._context(tls), self._sans(tls)) if tls.values else (None, frozenset[str]())
        return WebConfig(context, sans, self._users(top.table("basic_auth_users")), self._http(top))

    def _mapping(self) -> dict[str, Any]:
        try:
            return mapping(self._read("", self._path))
        except ValueError as error:
            raise self._error("", str(error)) from error

    def _error(self, key: str, text: str) -> ConfigError:
        return ConfigError(printable(f"{WHERE}: {self._path}: {key}{': ' if key else ''}{text}"))

    def _read(self, key: str, path: Path) -> bytes:
        try:
            text = read_bytes(path)
        except OSError as error:
            raise self._error(key, f"{path}: {error.strerror}" if key else str(error.strerror)) from error
        except (ConfigError, ValueError) as error:  # not a regular file, or a path with NUL
            raise self._error(key, str(error)) from error
        if len(text) > _MAX_BYTES:
            raise self._error(key, f"{path}: expected at most {_MAX_BYTES} bytes, found {len(text)}")
        self._texts[path] = text
        return text

    def _pem(self, tls: Table, key: str, *, required: bool = True) -> tuple[str, bytes]:
        """Return the key in use and the text, either inline from `key` or from the file in `key`_file."""
        inline, name = tls.text(key), tls.text(f"{key}_file")
        where = tls.path(key if inline else f"{key}_file")
        if inline and name:
            raise self._error(where, f"expected {key} or {key}_file, not both")
        if name:
            return where, self._read(where, self._path.parent / name)
        if not inline and required:
            raise self._error(where, "missing: TLS needs a certificate and a key")
        return where, inline.encode()

    def _context(self, tls: Table) -> ssl.SSLContext:
        tls.check_keys(*_TLS_KEYS)
        if "curve_preferences" in tls.values:
            raise self._error(tls.path("curve_preferences"), "not supported: OpenSSL chooses the curve")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        if tls.boolean("prefer_server_cipher_suites", default=True):
            context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
        self._set_versions(context, tls)
        self._set_suites(context, tls)
        self._set_certificate(context, tls)
        self._set_client_auth(context, tls)
        return context

    def _set_versions(self, context: ssl.SSLContext, tls: Table) -> None:
        for key in ("min_version", "max_version"):
            name = tls.text(key)
            if name in _OLD_VERSIONS:
                raise self._error(tls.path(key), f"{name} is not supported: expected {' or '.join(_VERSIONS)}")
            if name and name not in _VERSIONS:
                raise self._error(tls.path(key), f"expected {' or '.join(_VERSIONS)}, found {name!r}")
        context.minimum_version = _VERSIONS[tls.text("min_version") or "TLS12"]
        context.maximum_version = _VERSIONS[tls.text("max_version") or "TLS13"]
        if context.maximum_version < context.minimum_version:
            raise self._error(tls.path("max_version"), "expected at least min_version")

    def _set_suites(self, context: ssl.SSLContext, tls: Table) -> None:
        names, where = tls.texts("cipher_suites"), tls.path("cipher_suites")
        for name in names:
            if name not in _SUITES and name not in _TLS13_SUITES:
                hint = nearest(name, (*_SUITES, *_TLS13_SUITES))
                raise self._error(where, f"unknown suite {name!r}{hint}")
        suites = [_SUITES[name] for name in names if name in _SUITES]
        if suites:
            context.set_ciphers(":".join(suites))
        elif names and context.minimum_version == ssl.TLSVersion.TLSv1_2:
            raise self._error(
                where, "expected at least one suite of TLS 1.2, found none: add one, or set min_version to TLS13"
            )

    def _set_certificate(self, context: ssl.SSLContext, tls: Table) -> None:
        (certificate_key, certificate), (key_key, key) = self._pem(tls, "cert"), self._pem(tls, "key")
        encrypted = False

        def password() -> bytes:  # otherwise OpenSSL would prompt on the terminal
            nonlocal encrypted
            encrypted = True
            return b""

        try:
            with _memory_file(certificate) as certificate_path, _memory_file(key) as key_path:
                context.load_cert_chain(certificate_path, key_path, password)
        except (OSError, ValueError) as error:
            why = _NOT_ENCRYPTED if encrypted else _reason(error)
            raise self._error(key_key if encrypted else f"{certificate_key} and {key_key}", why) from error

    def _set_client_auth(self, context: ssl.SSLContext, tls: Table) -> None:
        kind, where = tls.text("client_auth_type") or "NoClientCert", tls.path("client_auth_type")
        if kind in _UNVERIFIED:
            raise self._error(where, f"{kind} does not verify certificates: expected RequireAndVerifyClientCert")
        if kind not in _CLIENT_AUTH:
            raise self._error(where, f"expected one of {', '.join(_CLIENT_AUTH)}, found {kind!r}")
        ca_key, authority = self._pem(tls, "client_ca", required=False)
        if bool(authority) != (kind != "NoClientCert"):
            raise self._error(where, f"{kind} {'takes no' if authority else 'needs'} client_ca or client_ca_file")
        if not authority:
            return
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (OSError, ValueError) as error:
            raise self._error(ca_key, _reason(error)) from error
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # intermediate authorities are allowed
        context.verify_mode = _CLIENT_AUTH[kind]

    def _sans(self, tls: Table) -> frozenset[str]:
        names, where = tls.texts("client_allowed_sans"), tls.path("client_allowed_sans")
        if names and tls.text("client_auth_type") != "RequireAndVerifyClientCert":
            raise self._error(where, "needs client_auth_type: RequireAndVerifyClientCert")
        return frozenset(map(_san, names))

    def _users(self, users: Table) -> dict[str, str]:
        for number, (name, hashed) in enumerate(users.values.items(), 1):
            found = _HASH.fullmatch(hashed) if isinstance(hashed, str) else None
            # Without the colon, or the space after it, the password would be part of the name.
            is_name = name and hashed and not re.search(r"\s", name)
            where = users.path(name) if is_name else f"basic_auth_users: entry {number}"
            if not name or ":" in name or not name.isprintable():
                raise self._error(where, "expected a user name: printable, not empty, without a colon")
            if not found:  # the value may be the plain password, so it is not shown
                raise self._error(where, "expected a bcrypt hash, such as `htpasswd -nBC 10 USER` prints")
            if int(found[1]) not in _COSTS:
                raise self._error(where, f"expected a cost from {_COSTS[0]} to {_COSTS[-1]}, found {int(found[1])}")
        return users.values

    def _http(self, top: Table) -> dict[str, str]:
        http = top.table("http_server_config")
        http.check_keys("http2", "headers")
        if http.boolean("http2", default=False):
            raise self._error(http.path("http2"), "HTTP/2 is not supported: remove the key, or set it to false")
        headers = http.table("headers")
        headers.check_keys(*_HEADERS)
        for name in headers.values:
            value, allowed = headers.text(name), _HEADERS[name]
            if value and allowed and value not in allowed:
                raise self._error(headers.path(name), f"expected {' or '.join(allowed)}, found {value!r}")
            if not value.isascii() or not value.isprintable():
                raise self._error(headers.path(name), "expected printable ASCII")
        return {name: headers.text(name) for name in headers.values if headers.text(name)}


@contextlib.contextmanager
def _memory_file(text: bytes) -> Iterator[str]:
    """Yield the path of a file in memory with this text."""
    with open(os.memfd_create("web.config", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(text)
        yield f"/proc/self/fd/{file.fileno()}"


def _reason(error: Exception) -> str:
    """Return OpenSSL's reason, without the line of its source code, or that of a system call."""
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return str(error.strerror)
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else "not in PEM format"


def _san(name: str) -> str:
    """Return a name in normal form: OpenSSL formats IPv6 addresses differently."""
    try:
        return str(ip_address(name))
    except ValueError:
        return name
