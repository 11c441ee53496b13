"""A client of the schema registry. Each request has one deadline, and every response is checked.

An error counts as the registry's only if it is JSON with an error code that matches the status. Answers from a proxy, a
login page or another service are treated as no response.
"""

import base64
import json
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeGuard
from urllib.parse import quote, urlsplit
from urllib.request import Request

import certifi

from producer.config.load import Registry, read_secret
from producer.errors import ConfigError
from producer.events import SchemaId
from producer.host import state_file
from producer.host.http_exchange import Answer, ExchangeError, exchange
from producer.host.signals import Flag
from producer.host.text import parse_json

MOST_ID = (1 << 31) - 1
NOT_FOUND = frozenset({40401, 40402, 40403})
"""Subject, version, schema. Not 404: the registry returns that for unknown paths."""
INCOMPATIBLE = frozenset({409, 40901, 40902})
INVALID = frozenset({422, 42201, 42202, 42203, 42204, 42205, 42206})
_READ_ONLY = 42205
_TYPES = frozenset(
    {"application/json", "application/vnd.schemaregistry.v1+json", "application/vnd.schemaregistry+json"}
)
_SHOWN = 120
_UNAUTHORIZED = (401, 403)

AvroSchema = Mapping[str, Any]


class RegistryRejected(Exception):
    """The registry answered with an error; `code` is its error code."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(f"{message} (error code {code})")
        self.status = status
        self.code = code


class NotAuthorized(Exception):
    """The registry, or a proxy before it, rejects the authentication: `status` is 401 or 403."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class NoAnswer(Exception):
    """No response, or (`answered`) one that is not from a registry."""

    answered = True


class RegistryClient:
    """One registry. Requests raise RegistryRejected, NotAuthorized or NoAnswer, and Stopped with `stop`.

    Its files are read for each request, since passwords and certificates are renewed.
    """

    def __init__(self, settings: Registry, stop: Flag | None = None) -> None:
        self._url = (settings.url or "").rstrip("/")
        parts = urlsplit(self._url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"registry.url must be http://HOST[:PORT][/PATH] or https://..., not {self._url!r}")
        self._settings = settings
        self._stop = stop
        self._access()

    def _access(self) -> tuple[dict[str, str], ssl.SSLContext | None]:
        """Return a request's headers and TLS settings, from files that may have been renewed. Raises ConfigError."""
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        try:
            if (auth := self._settings.auth) is not None:
                secret = read_secret(auth, "registry.auth")
                if ":" not in secret:
                    raise ConfigError(f"registry.auth: {auth}: expected USER:PASSWORD in the first line")
                headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
            return headers, _tls(self._settings) if self._url.lower().startswith("https:") else None
        except (OSError, ValueError) as error:  # none of these contains the secret
            raise ConfigError(f"registry: {error}: check url, auth, ca, certificate and key in [registry]") from error

    def register(self, subject: str, schema: AvroSchema) -> SchemaId:
        """Register a schema unless it is registered, and return its id."""
        try:
            answer = self._ask("POST", f"/subjects/{quote(subject, safe='')}/versions", _request_body(schema))
        except (RegistryRejected, NotAuthorized) as error:
            # A registry that is read-only, or for this user, refuses schemas that it has, too.
            if isinstance(error, RegistryRejected) and error.code != _READ_ONLY:
                raise
            with suppress(RegistryRejected, NotAuthorized):
                return self.look_up(subject, schema)
            raise
        return _schema_id(answer)

    def look_up(self, subject: str, schema: AvroSchema) -> SchemaId:
        """Return the id of a subject's schema. Raises NoAnswer if the response does not contain this schema."""
        answer = self._ask("POST", f"/subjects/{quote(subject, safe='')}", _request_body(schema))
        if _differs(answer.get("schema", ""), schema):
            raise NoAnswer(f"the response does not have the schema of {subject}")
        return _schema_id(answer)

    def schema(self, schema_id: int) -> str:
        """Return the text of the schema with this id."""
        text = self._ask("GET", f"/schemas/ids/{schema_id}").get("schema")
        if not isinstance(text, str):
            raise NoAnswer(f"no schema in the response for schema id {schema_id}")
        return text

    def compatible(self, subject: str, schema: AvroSchema) -> bool:
        """Return whether the schema is compatible with the subject's latest."""
        path = f"/compatibility/subjects/{quote(subject, safe='')}/versions/latest"
        verdict = self._ask("POST", path, _request_body(schema)).get("is_compatible")
        if not isinstance(verdict, bool):
            raise NoAnswer("no is_compatible in the response")
        return verdict

    def set_compatibility(self, subject: str, level: str) -> None:
        """Set a subject's compatibility level."""
        answer = self._ask("PUT", f"/config/{quote(subject, safe='')}", {"compatibility": level})
        if answer.get("compatibility", answer.get("compatibilityLevel")) != level:
            raise NoAnswer(f"compatibility {level} was not confirmed")

    def answers(self) -> bool:
        """Return whether a registry answers at all."""
        try:
            return "compatibilityLevel" in self._ask("GET", "/config")
        except RegistryRejected:
            return True
        except (NoAnswer, NotAuthorized):
            return False

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            headers, tls = self._access()
        except ConfigError as error:
            raise NoAnswer(str(error)) from error
        request = Request(self._url + path, method=method, headers=headers)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        try:
            answer = exchange(request, self._settings.timeout_s, tls=tls, stop=self._stop)
        except ExchangeError as error:
            no_answer = NoAnswer(str(error))
            no_answer.answered = False
            raise no_answer from error
        return _parsed(answer)


def plain(schema: Any) -> Any:
    """Return a schema without doc and aliases, for comparison."""
    if isinstance(schema, dict):
        kept = {key: plain(value) for key, value in schema.items() if key not in ("doc", "aliases")}
        return kept["type"] if kept.keys() == {"type"} else kept
    return [plain(each) for each in schema] if isinstance(schema, list) else schema


def _differs(text: Any, schema: AvroSchema) -> bool:
    try:
        return bool(plain(_json(text)) != plain(schema))
    except RecursionError:  # ours is not that deep
        return True


def _parsed(answer: Answer) -> dict[str, Any]:
    """Return the content of a registry's response; raise NoAnswer for any other."""
    content = _json(answer.body) if answer.content_type in _TYPES else None
    if isinstance(content, dict):
        if answer.status == 200 and "error_code" not in content:
            return content
        code = content.get("error_code")
        if isinstance(code, int) and answer.status in (404, 409, 422) and str(code).startswith(str(answer.status)):
            raise RegistryRejected(answer.status, code, str(content.get("message", ""))[:_SHOWN])
    if answer.status in _UNAUTHORIZED:
        raise NotAuthorized(answer.status)
    beginning = answer.body[:_SHOWN].decode(errors="replace")
    raise NoAnswer(f"not a registry's response: status {answer.status}, {answer.content_type}, {beginning!r}")


def _json(text: Any) -> Any:
    try:
        return parse_json(text)
    except (ValueError, TypeError):
        return None


def _schema_id(answer: Mapping[str, Any]) -> SchemaId:
    number = answer.get("id")
    if not is_schema_id(number):
        raise NoAnswer(f"not a schema id: {str(number)[:_SHOWN]!r}")
    return SchemaId(number)


def is_schema_id(number: Any) -> TypeGuard[int]:
    """Return whether this is a valid schema id."""
    return type(number) is int and 0 < number <= MOST_ID


def _request_body(schema: AvroSchema) -> dict[str, str]:
    return {"schema": json.dumps(schema), "schemaType": "AVRO"}


def _tls(settings: Registry) -> ssl.SSLContext:
    for path in filter(None, (settings.ca, settings.certificate, settings.key)):
        state_file.check_ordinary(path)
    ca = settings.ca
    if ca is not None and ca.is_dir():
        context = ssl.create_default_context(capath=str(ca))
    else:
        context = ssl.create_default_context(cafile=str(ca) if ca is not None else certifi.where())
    if settings.certificate is not None:
        context.load_cert_chain(settings.certificate, settings.key, password="")
    return context
