"""Converts TOML tables to the dataclasses of the configuration, by the types of their fields.

An unknown key is an error that suggests the nearest known one.
"""

import dataclasses
import difflib
import functools
import ipaddress
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from producer.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_KINDS: Mapping[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Path: "a path in quotes",
}

_hints = functools.cache(typing.get_type_hints)  # slow, and a file can have a thousand rules


def build(kind: Any, table: Mapping[str, Any], where: str = "") -> Any:
    """Convert a table to the dataclass `kind`. A ConfigError begins with the path of the wrong setting.

    `where` is the path of the table, ending in a dot.
    """
    hints = _hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(f"unknown key {where}{key or repr(key)}{nearest(key, hints)}")
        values[key] = _value(hints[key], value, where + key)
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    """Convert a TOML value to the type of its field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    is_mapping = origin is not None and issubclass(origin, Mapping)
    if (dataclasses.is_dataclass(kind) or is_mapping) and not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a table, [{where}], found {value!r}")
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where + ".")
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        paths = (f"{where}[{i}]" if isinstance(each, dict) else where for i, each in enumerate(value, 1))
        return tuple(_value(arguments[0], each, path) for each, path in zip(value, paths, strict=True))
    if is_mapping:
        return {name: _text(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(kind, types.UnionType) and type(None) in arguments:
        return _value(arguments[0], value, where)
    if isinstance(kind, types.UnionType) and type(value) in arguments:
        return value
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind == Address:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: expected an address in quotes, found {value!r}")
        try:
            return ipaddress.ip_address(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    if kind is Path and isinstance(value, str):
        if not value.strip():  # it would be the working directory
            raise ConfigError(f"{where}: expected a path, found {value!r}")
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {_KINDS.get(kind, 'a number or a string')}, found {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    """Return a librdkafka setting as text: TOML numbers and booleans are accepted. Errors do not show secrets."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    found = "a table: put a name with dots in quotes" if isinstance(value, dict) else "a list or a time"
    raise ConfigError(f"{where}: expected a string, a number or a boolean, found {found}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean NAME?` with the nearest known name, for an error; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {close[0]}?" if close else ""
