"""Schema ids from a Confluent-compatible registry, or from a cache of its responses while it is unavailable.

The subject of a topic's value schema is `<topic>-value`. The cache (`schema_ids.json` in the state folder) is keyed by
registry, subject and the schema's text, so that an id is never used for another schema.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from producer.config.load import Registry
from producer.errors import PermissionDenied, SchemaError, Stopped, UnavailableError
from producer.events import SchemaId, Topic
from producer.health.metrics import counted
from producer.host import state_file
from producer.host.signals import Flag
from producer.host.text import parse_json
from producer.registry.client import (
    INCOMPATIBLE,
    INVALID,
    NOT_FOUND,
    AvroSchema,
    NoAnswer,
    NotAuthorized,
    RegistryClient,
    RegistryRejected,
    is_schema_id,
)

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

COMPATIBILITY = "FULL_TRANSITIVE"
"""Consumers can read newer events with an older schema, and older events with a newer one."""

_ATTEMPTS = 4
_MOST_CACHE_BYTES = 1 << 20


class SchemaIds:
    """Finds schema ids in the registry of `settings`, or in the file `cache`.

    `stop` ends every wait, with Stopped.
    """

    def __init__(
        self, settings: Registry, cache: Path | None, attempts: int = _ATTEMPTS, stop: Flag | None = None
    ) -> None:
        self._stop: Flag = stop if stop is not None else threading.Event()
        self._client = RegistryClient(settings, self._stop)
        self._settings = settings
        self._cache = cache
        self._attempts = attempts

    def find(
        self, schemas: Mapping[Topic, AvroSchema], optional: Mapping[Topic, AvroSchema] = MappingProxyType({})
    ) -> dict[Topic, SchemaId]:
        """Return each topic's schema id; optional ones are omitted if unavailable.

        Raises SchemaError if the registry does not have a schema or rejects it. Raises UnavailableError if it does not
        answer, and PermissionDenied if it rejects us, unless the cache has the ids.
        """
        everything = {**schemas, **optional}
        keys = {topic: self._cache_key(topic, schema) for topic, schema in everything.items()}
        call = self.register if self._settings.register else self.look_up
        try:
            ids = {topic: call(topic, schema) for topic, schema in schemas.items()}
        except (PermissionDenied, UnavailableError) as error:
            cached = self._read_cache()
            if not cached.keys() >= {keys[topic] for topic in schemas}:
                raise
            logger.warning("registry: %s; using cached schema ids", error)
            return {topic: cached[key] for topic, key in keys.items() if key in cached}
        for topic, schema in optional.items():
            try:
                ids[topic] = call(topic, schema)
            except (PermissionDenied, SchemaError, UnavailableError) as error:
                logger.warning("%s; not sending to topic %s", error, topic)
        if self._cache:
            try:
                content = json.dumps({keys[topic]: number for topic, number in ids.items()})
                state_file.write(self._cache, content.encode())
            except OSError as error:
                logger.warning("registry: cannot cache the schema ids: %s", error)
        return ids

    def set_compatibility(self, topic: Topic) -> None:
        """Make the registry reject schemas of the topic that are not compatible both ways with all earlier ones."""
        self._ask(topic, lambda: self._client.set_compatibility(_subject(topic), COMPATIBILITY))

    def register(self, topic: Topic, schema: AvroSchema) -> SchemaId:
        """Register a topic's schema unless it is registered, and return its id."""
        return self._ask(topic, lambda: self._client.register(_subject(topic), schema))

    def compatible(self, topic: Topic, schema: AvroSchema) -> bool:
        """Return whether the registry would accept the schema."""
        return self._ask(topic, lambda: self._client.compatible(_subject(topic), schema))

    def look_up(self, topic: Topic, schema: AvroSchema) -> SchemaId:
        """Return the id of a topic's schema; SchemaError if the registry does not have it."""
        return self._ask(topic, lambda: self._client.look_up(_subject(topic), schema))

    def _ask(self, topic: Topic, call: Callable[[], _Answer]) -> _Answer:
        retrying = Retrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.3, max=5),
            before_sleep=counted("registry"),
            sleep=self._sleep,
            stop=stop_after_attempt(self._attempts),
            reraise=True,
        )
        answer: _Answer = retrying(self._translate_errors, topic, call)
        return answer

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped(f"stopped while waiting for the registry {self._settings.url}")

    def _translate_errors(self, topic: Topic, call: Callable[[], _Answer]) -> _Answer:
        """Call the registry, and translate its errors to ours."""
        url = self._settings.url
        try:
            return call()
        except RegistryRejected as error:
            if error.code in INCOMPATIBLE:
                raise SchemaError(f"registry {url}: {_subject(topic)} has an incompatible schema: {error}") from error
            if error.code in NOT_FOUND:
                raise SchemaError(
                    f"registry {url} does not have {_subject(topic)} in this version: run `rebpf init`"
                ) from error
            if error.code in INVALID:
                raise SchemaError(f"registry {url} rejects the schema of {_subject(topic)}: {error}") from error
            raise UnavailableError(f"registry {url}: {error}; check registry.url, including its path") from error
        except NotAuthorized as error:
            raise PermissionDenied(f"registry {url} rejects the authentication: {error}") from error
        except NoAnswer as error:
            raise UnavailableError(f"registry {url} does not answer: {error}") from error

    def _cache_key(self, topic: Topic, schema: AvroSchema) -> str:
        digest = hashlib.sha256(json.dumps(schema).encode()).hexdigest()
        return f"{self._settings.url} {_subject(topic)} {digest}"

    def _read_cache(self) -> dict[str, SchemaId]:
        """Return the valid entries of the cache."""
        if self._cache is None:
            return {}
        try:
            content = parse_json(state_file.read(self._cache, _MOST_CACHE_BYTES))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: SchemaId(number) for key, number in content.items() if is_schema_id(number)}


def _subject(topic: Topic) -> str:
    return f"{topic}-value"
