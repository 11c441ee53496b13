"""The files of the configuration: the one that the user names, then conf.d/*.toml beside it, in order of their names.

Tables are merged. A value replaces that of an earlier file; lists of tables, such as [[rules]], are joined.
"""

import contextlib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.config import locate
from producer.errors import ConfigError
from producer.host.state_file import at_most
from producer.host.text import printable

CONF_D = "conf.d"

_MAX_FILE_BYTES = 1 << 24
_MAX_FILES = 256
_MAX_BYTES = 1 << 22
"""Of all files together: a reload takes some seconds to read as much."""
_MAX_MESSAGE = 1000
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Sources:
    """The files, as they were read, and their merged content."""

    files: tuple[locate.Source, ...]
    table: Mapping[str, Any]

    def has(self, error: ConfigError) -> bool:
        """Return whether a file has the setting that the error's text begins with, and the text does not say so yet."""
        is_located = any(str(error).startswith(f"{printable(str(each.path))}: ") for each in self.files)
        is_setting = re.match(r"[\w.\[\]-]+:|rules? ", str(error)) is not None
        return is_setting and not is_located and locate.find(self.files, str(error)) is not None

    def message(self, error: ConfigError) -> str:
        """Return the error's text with the file and the line of the setting that it begins with."""
        found = locate.find(self.files, str(error))
        path, line = (found[0].path, f"line {found[1]}: ") if found else (self.files[0].path, "")
        return f"{printable(str(path))}: {line}{shown(str(error))}"

    def origins(self) -> dict[str, str]:
        """Return FILE:LINE of the line that sets each value, by the setting's path: `rules[2].port`."""
        found = {
            key: f"{printable(str(each.path))}:{line}" for each in self.files for key, line in locate.locations(each)
        }
        for path in _paths(self.table):  # what is in an inline table has the table's line
            above = path
            while above and above not in found:
                above = above.rpartition(".")[0]
            found[path] = found.get(above, "")
        return found


def read(path: Path) -> Sources:
    """Read and merge the files. Raises ConfigError."""
    table: dict[str, Any] = {}
    files: list[locate.Source] = []
    size = 0
    for each in (path, *_fragments(path.parent / CONF_D)):
        text = _text(each)
        size += len(text.encode())
        if size > _MAX_BYTES:
            what = "at most" if each == path else "the files up to this one to have at most"
            raise ConfigError(f"{each}: expected {what} {_MAX_BYTES} bytes; move lists of addresses to an @FILE")
        own = _parse(each, text)
        before = _lengths(table)
        table = _merged(table, own)
        lists = {name: range(before.get(name, 0), count) for name, count in _lengths(table).items()}
        files.append(locate.Source(each, text, lists))
    return Sources(tuple(files), table)


def state(path: Path | None) -> tuple[tuple[str, int, int, int], ...]:
    """Return what differs once one of the files has changed. Files that cannot be read count as missing."""
    if path is None:
        return ()
    try:
        return stamps((path, *_fragments(path.parent / CONF_D)))
    except ConfigError:
        return stamps((path,))


def stamps(paths: Iterable[Path]) -> tuple[tuple[str, int, int, int], ...]:
    """Return what differs once one of the files has been changed or replaced; those that are missing are left out."""
    found = []
    for each in paths:
        with contextlib.suppress(OSError, ValueError):
            status = each.stat()
            found.append((str(each), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _fragments(folder: Path) -> Sequence[Path]:
    """Return the files of conf.d; editors' hidden files are left out."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".toml") and not name.startswith("."))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return ()
        raise ConfigError(f"{printable(str(folder))}: {getattr(error, 'strerror', error)}") from error
    if len(names) > _MAX_FILES:
        raise ConfigError(f"{printable(str(folder))}: expected at most {_MAX_FILES} files, found {len(names)}")
    return [folder / name for name in names]


def _merged(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(earlier)
    for key, value in later.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _merged(known, value)
        elif _has_tables(known) and _has_tables(value):
            merged[key] = [*merged[key], *value]
        else:
            merged[key] = value
    return merged


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _lengths(table: Mapping[str, Any], path: str = "") -> dict[str, int]:
    """Return the length of each list of tables, by its path."""
    found: dict[str, int] = {}
    for key, value in table.items():
        if _has_tables(value):
            found[path + key] = len(value)
        elif isinstance(value, dict):
            found |= _lengths(value, f"{path}{key}.")
    return found


def _paths(table: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the paths of all values that are not tables."""
    return [
        found
        for key, value in table.items()
        for found in (_paths(value, f"{path}{key}.") if isinstance(value, dict) else [path + key])
    ]


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        table = tomllib.loads(text)
        if _is_deep(table):
            raise RecursionError
    except RecursionError:
        raise ConfigError(f"{path}: tables or lists are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number with too many digits
        raise ConfigError(f"{path}: {shown(str(error))}") from error
    return table


def _is_deep(table: Mapping[str, Any]) -> bool:
    """Whether tables or lists are nested deeper than any setting: a dotted key nests without recursion."""
    level: list[Any] = [table]
    for _ in range(_MAX_DEPTH):
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in level if isinstance(item, dict | list)]
    return bool(level)


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file of bounded size. Raises OSError or ConfigError.

    Reading a FIFO could block, and a device may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{path}: expected a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = at_most(file, _MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: expected at most {_MAX_FILE_BYTES} bytes; move long lists of addresses to an @FILE")
    return content


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a path with NUL
        raise ConfigError(f"{printable(str(path))}: {error}") from error


def shown(text: str) -> str:
    """Return text from a user's file as one bounded, printable line."""
    text = printable(text[: _MAX_MESSAGE + 1])
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."
