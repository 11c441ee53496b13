"""Decodes batches of messages: Confluent's wire format and Avro, to columns or to records.

Whoever may write to a topic or register a schema chooses the input. So only our records are decoded (accepted.py),
values and strings have a maximum length, and a rejected schema id is not requested again for a while.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from producer.config.load import Registry
from producer.consume.accepted import MOST_VALUE_BYTES, NotAccepted, accepted
from producer.consume.columns import Columns, Table, Values, decode, groups, joined, rows_of, schema_ids
from producer.consume.plan import FieldError, Fields, Plan, plan_for, plan_for_all, plan_for_names
from producer.errors import Stopped, UnavailableError
from producer.events import Ints, SchemaId
from producer.host.signals import Flag
from producer.registry.client import MOST_ID, NOT_FOUND, NoAnswer, NotAuthorized, RegistryClient, RegistryRejected
from producer.schemas import FIXED, load_schema

_ATTEMPTS = 3
_REJECTED_S = 60
_REQUESTS_PER_S = 10.0
_MOST_REQUESTS = 100.0
"""Burst size: a topic has few schemas, unless somebody fills it with foreign messages."""
MOST_SCHEMAS = 1000
MOST_TEXT = 4096
"""Longest string in a record, in characters; our names have up to 1024."""
MOST_PAIRS = 64
"""Entries of a map in a record; our hosts have up to 16 labels."""
_NO_ID = {-1: "not in Confluent's wire format", -2: f"longer than {MOST_VALUE_BYTES} bytes"}
"""Why a value has no schema id, by the native decoder's code."""
_TEXT_TOO_LONG, _MAP_TOO_LARGE = 2, 3


class Rejected(NamedTuple):
    """The index of a message in its batch, and why it was not decoded."""

    row: int
    reason: str


class UndecodableError(ValueError):
    """A message is not ours, or its schema is unavailable."""


class Decoder:
    """Decodes Avro in Confluent's wire format. Without a registry, schema ids are the fixed ones of this version.

    `fixed` has others, by id. An id that the registry rejects, or whose schema is not ours,
    is requested at most once a minute, since a topic may be full of such messages. `stop` ends every wait.

    Raises UnavailableError if the registry does not answer before it has returned any schema. After that, a message
    with a new id is undecodable, and no other id is requested for a minute: a writer must not be able to stop a reader.
    """

    def __init__(
        self,
        registry: Registry | None,
        fixed: Mapping[SchemaId, Mapping[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        stop: Flag | None = None,
    ) -> None:
        self._schemas: dict[int, Any] = {}
        self._plans: dict[tuple[int, Fields | frozenset[str] | None], Plan] = {}
        self._rejected: dict[int, tuple[float, str]] = {}
        """Until when, and the reason, by id; oldest first."""
        self._clock = clock
        self._stop = stop
        self._requests, self._counted_at = _MOST_REQUESTS, clock()
        """Remaining requests, and when they were counted."""
        self._silent_until = 0.0
        self._client = None
        if registry is None or registry.url is None:
            for number, schema in (fixed or {number: load_schema(file) for number, file in FIXED.items()}).items():
                self._schemas[number] = accepted(json.dumps(schema))
        else:
            self._client = RegistryClient(registry, stop)

    def columns(self, values: Values, fields: Fields) -> tuple[Columns, list[Rejected]]:
        """Return the fields of a batch of values, and the rejected ones."""
        parts, rejected = self.tables(values, fields)
        return joined(fields, parts), rejected

    def tables(
        self, values: Values, fields: Fields | frozenset[str] | None = None
    ) -> tuple[list[tuple[Ints, Table]], list[Rejected]]:
        """Return the fields by schema, each table with its rows; and the rejected values.

        `fields` are names with types, which each schema must have; names, of which each schema has some; or all.
        """
        parts: list[tuple[Ints, Table]] = []
        rejected: list[Rejected] = []
        for schema_id, rows in _by_schema(values):
            try:
                table = decode(_chosen(values, rows), self._plan(schema_id, fields))
            except UndecodableError as exc:
                rejected += [Rejected(row, str(exc)) for row in rows.tolist()]
                continue
            parts.append((rows, table))
            bad = np.flatnonzero(table.status)
            rejected += [Rejected(int(rows[at]), _reason(table.status[at], schema_id)) for at in bad.tolist()]
        return parts, rejected

    def records(self, values: Values) -> list[dict[str, Any] | UndecodableError]:
        """Return each value's record, without lists and bytes, or why there is none; timestamps stay numbers."""
        found: list[Any] = [None] * len(values)
        parts, rejected = self.tables(values)
        for row, reason in rejected:
            found[row] = UndecodableError(reason)
        for rows, table in parts:
            decoded = rows[table.status == 0].tolist()
            for row, record in zip(decoded, rows_of(table.columns()), strict=True):
                found[row] = record
        return found

    def _plan(self, schema_id: int, fields: Fields | frozenset[str] | None) -> Plan:
        """Return the plan for a schema's fields: with these types, by name, or all."""
        if schema_id in _NO_ID:
            raise UndecodableError(_NO_ID[schema_id])
        schema = self.schema(schema_id)
        plan = self._plans.get((schema_id, fields))
        if plan is None:
            try:
                plan = _new_plan(schema, fields)
            except FieldError as exc:
                raise UndecodableError(f"schema {schema_id} has {exc}") from exc
            if len(self._plans) >= MOST_SCHEMAS:
                self._plans.clear()
            self._plans[schema_id, fields] = plan
        return plan

    def schema(self, schema_id: int) -> Any:
        """Return a schema by id, parsed and without logical types."""
        schema = self._schemas.get(schema_id) or self._fetch(schema_id)
        _put_bounded(self._schemas, schema_id, schema)
        return schema

    def _fetch(self, schema_id: int) -> Any:
        if self._client is None:
            raise UndecodableError(f"schema id {schema_id} is not one of the fixed ids: set --registry")
        if not 0 < schema_id <= MOST_ID:
            raise UndecodableError(f"schema id {schema_id} is out of range")
        until, reason = self._rejected.get(schema_id, (0.0, ""))
        if reason and self._clock() < until:
            raise UndecodableError(reason)
        self._spend()
        try:
            schema = accepted(self._ask(self._client, schema_id))
        except NotAccepted as exc:
            raise self._reject(schema_id, f"schema id {schema_id} is not one of ours: {exc}") from exc
        except (RegistryRejected, NoAnswer, NotAuthorized) as exc:
            raise self._no_schema(schema_id, exc) from exc
        self._rejected.pop(schema_id, None)
        return schema

    def _spend(self) -> None:
        """Count a request; UndecodableError if there were too many, or if the registry has just not answered."""
        now = self._clock()
        if now < self._silent_until:
            raise UndecodableError("the schema registry does not answer: new schema ids are not requested for now")
        self._requests = min(_MOST_REQUESTS, self._requests + _REQUESTS_PER_S * (now - self._counted_at))
        self._counted_at = now
        if self._requests < 1:
            raise UndecodableError("too many unknown schema ids: not all are requested")
        self._requests -= 1

    def _ask(self, client: RegistryClient, schema_id: int) -> str:
        if self._schemas:  # messages with known ids can be read meanwhile
            return client.schema(schema_id)
        retrying = Retrying(
            retry=retry_if_exception_type(NoAnswer),
            wait=wait_random_exponential(multiplier=0.3, max=2),
            sleep=self._sleep,
            stop=stop_after_attempt(_ATTEMPTS),
            reraise=True,
        )
        return retrying(client.schema, schema_id)

    def _sleep(self, seconds: float) -> None:
        if self._stop is None:
            time.sleep(seconds)
        elif self._stop.wait(seconds):
            raise Stopped("stopped while waiting for the schema registry")

    def _no_schema(self, schema_id: int, error: Exception) -> UndecodableError | UnavailableError:
        """Return the error for an id whose schema the registry did not return."""
        if isinstance(error, RegistryRejected) and error.code in NOT_FOUND:
            return self._reject(schema_id, f"the registry does not know schema id {schema_id}")
        reason = f"the schema registry does not answer for schema id {schema_id}: {error}"
        if not self._schemas and not self._is_about_id(error):
            return UnavailableError(reason)
        if isinstance(error, NoAnswer) and not error.answered:
            self._silent_until = self._clock() + _REJECTED_S
        return self._reject(schema_id, reason)

    def _is_about_id(self, error: Exception) -> bool:
        """Return whether the registry works, and fails only for this id."""
        if isinstance(error, NotAuthorized):
            return error.status == HTTPStatus.FORBIDDEN
        return self._client is not None and self._client.answers()

    def _reject(self, schema_id: int, reason: str) -> UndecodableError:
        """Block requests of an id for a while, and return the error."""
        _put_bounded(self._rejected, schema_id, (self._clock() + _REJECTED_S, reason))
        return UndecodableError(reason)


def _new_plan(schema: Any, fields: Fields | frozenset[str] | None) -> Plan:
    if fields is None:
        return plan_for_all(schema)
    return plan_for_names(schema, fields) if isinstance(fields, frozenset) else plan_for(schema, fields)


def _put_bounded(cache: dict[int, Any], schema_id: int, value: Any) -> None:
    """Put last in a cache, and drop its first if it is full: ids come from messages and are unlimited."""
    cache.pop(schema_id, None)
    if len(cache) >= MOST_SCHEMAS:
        del cache[next(iter(cache))]
    cache[schema_id] = value


def _by_schema(values: Values) -> Iterator[tuple[int, Ints]]:
    """Yield each schema id and its rows."""
    ids = schema_ids(values)
    if not len(ids):
        return
    if (ids == ids[0]).all():
        yield int(ids[0]), np.arange(len(ids))
        return
    numbers, firsts = groups(ids)
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers))
    yield from zip(ids[firsts].tolist(), np.split(order, ends[:-1]), strict=True)


def _chosen(values: Values, rows: Ints) -> Values:
    return values if len(rows) == len(values) else [values[row] for row in rows.tolist()]


def _reason(status: int, schema_id: int) -> str:
    if status == _TEXT_TOO_LONG:
        return f"a string is longer than {MOST_TEXT} characters"
    if status == _MAP_TOO_LARGE:
        return f"a map has more than {MOST_PAIRS} entries"
    return f"not a value of schema {schema_id}"
