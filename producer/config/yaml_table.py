"""Reads YAML the way Go programs do: mappings with known keys, all scalars as text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from producer.config.convert import nearest
from producer.errors import ConfigError

_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}

_MOST_BRACKETS = 100


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping and its path in the file. All scalars are text; an empty one counts as missing."""

    name: str
    values: dict[str, Any]
    error: Callable[[str, str], ConfigError]

    def path(self, key: str) -> str:
        """Return a key's path in the file."""
        return f"{self.name}.{key}" if self.name else key

    def check_keys(self, *known: str) -> None:
        """Raise an error for the first unknown key."""
        for key in self.values:
            if key not in known:
                raise self.error(self.path(key), f"unknown key{nearest(key, known)}")

    def _of_kind(self, key: str, kind: type, what: str) -> Any:
        value = self.values.get(key)
        if value in (None, ""):
            return kind()
        if not isinstance(value, kind):
            raise self.error(self.path(key), f"expected {what}")
        return value

    def table(self, key: str) -> "Table":
        """Return a mapping; empty if the key is missing."""
        return Table(self.path(key), self._of_kind(key, dict, "a mapping"), self.error)

    def text(self, key: str) -> str:
        """Return a text; empty if the key is missing."""
        return str(self._of_kind(key, str, "text"))

    def texts(self, key: str) -> list[str]:
        """Return a list of non-empty texts."""
        values: list[Any] = self._of_kind(key, list, "a list")
        if not all(isinstance(each, str) and each for each in values):
            raise self.error(self.path(key), "expected a list of strings")
        return values

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return a boolean in any of YAML's spellings."""
        text = self.text(key).lower()
        if text and text not in _BOOLEANS:
            raise self.error(self.path(key), f"expected true or false, found {text!r}")
        return _BOOLEANS[text] if text else default


def mapping(text: bytes) -> dict[str, Any]:
    """Return the mapping of a document; empty if the document is. Raises ValueError."""
    import yaml  # imported only if needed, to save memory

    class Loader(yaml.BaseLoader):  # creates only text, lists and mappings
        def fetch_flow_collection_start(self, TokenClass: Any) -> None:
            if self.flow_level >= _MOST_BRACKETS:  # each token costs time by the number of open brackets
                raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
            super().fetch_flow_collection_start(TokenClass)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(names) < len(node.value):
                raise yaml.MarkedYAMLError(problem="expected a key that is text", problem_mark=node.start_mark)
            if len(names) > len(set(names)):
                raise yaml.MarkedYAMLError(problem="duplicate key", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        value = yaml.load(text, Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.MarkedYAMLError as error:  # its own message quotes the line, which may hold a secret
        at = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{at}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError("expected YAML in UTF-8") from error
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value
