"""TOML's tables into the dataclasses of the configuration, by the types of their fields.

A key that is no field is refused, and the nearest that there is is named.
"""

import dataclasses
import difflib
import ipaddress
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from producer.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def build(kind: Any, table: Mapping[str, Any], where: str = "") -> Any:
    """Return the dataclass `kind` that a table stands for; ConfigError begins with the path of what is wrong in it.

    `where` is the table's own path, with a dot at its end.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(f"unknown key {where}{key}{nearest(key, hints)}")
        values[key] = _value(hints[key], value, where + key)
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    """Turn TOML's value into the field's type."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{where}: a number must fit in 64 bits, as TOML has them")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    is_mapping = origin is not None and issubclass(origin, Mapping)
    if (dataclasses.is_dataclass(kind) or is_mapping) and not isinstance(value, dict):
        raise ConfigError(f"{where} is a table: write [{where}]")
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where + ".")
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: a list is wanted")
        places = (f"{where}[{i}]" if isinstance(each, dict) else where for i, each in enumerate(value, 1))
        return tuple(_value(arguments[0], each, place) for each, place in zip(value, places, strict=True))
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
            raise ConfigError(f"{where}: an address in quotes is wanted, not {value!r}")
        try:
            return ipaddress.ip_address(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: {getattr(kind, '__name__', kind)} is wanted, not {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    """librdkafka's settings are text; TOML's own numbers and booleans are as good."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{where}: a number must fit in 64 bits, as TOML has them")
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigError(f"{where}: a string, a number or a boolean is wanted")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question for a message, after the one of the known names that comes near; empty where none does."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {close[0]}?" if close else ""
