"""What the keys of `rebpf top` do to what is shown."""

from dataclasses import dataclass, replace

from producer.view.filter import FilterError, parse
from producer.view.screen import KEYS
from producer.view.table import SORTS

_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10, "home": -(1 << 30)}
"""By how many lines a key moves the selection."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to show. `typed` is a filter that is being typed, and None otherwise."""

    by: str = "peer"
    sort: str = SORTS[0]
    filter_text: str = ""
    selected: int = 0
    follows: bool = False
    """Whether the selection stays on its line wherever that moves, instead of on its place."""
    paused: bool = False
    has_details: bool = False
    has_help: bool = False
    typed: str | None = None
    error: str = ""
    """Of what is typed: a line with a caret below the place, and what is wrong there."""
    quits: bool = False

    @property
    def message(self) -> str:
        """What the last lines of the screen say while a filter is typed."""
        if self.error:
            return f"/{self.typed}\n {self.error}"
        return "" if self.typed is None else f"/{self.typed}_"

    def after(self, key: str) -> "Choice":
        """Return the choice after a key."""
        if key == "eof":
            return replace(self, quits=True)
        if self.typed is not None:
            return self._typing(self.typed, key)
        if key == "q":
            return replace(self, quits=True)
        if self.has_help:
            return replace(self, has_help=False)
        if key == "escape":
            return replace(self, has_details=False, error="")
        if key == "enter":
            return replace(self, has_details=not self.has_details, follows=True)
        if key == "?":
            return replace(self, has_help=True)
        if self.has_details or key not in ("s", *KEYS):
            return self._moved(key)
        sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)] if key == "s" else self.sort
        return replace(self, by=KEYS.get(key, self.by), sort=sort, selected=0, follows=False)

    def _moved(self, key: str) -> "Choice":
        if key in _STEPS:
            selected = max(0, self.selected + _STEPS[key])
            return replace(self, selected=selected, follows=selected > 0 or self.has_details)
        match key:
            case " ":
                return replace(self, paused=not self.paused)
            case "/":
                return replace(self, typed=self.filter_text, error="", has_details=False)
        return self

    def _typing(self, typed: str, key: str) -> "Choice":
        if key == "escape":
            return replace(self, typed=None, error="")
        if key == "clear":
            return replace(self, typed="", error="")
        if key == "backspace":
            return replace(self, typed=typed[:-1])
        if key == "enter":
            try:
                parse(typed)
            except FilterError as error:
                return replace(self, typed=typed.strip(), error=f"{error.details[1][2:]}\n{error}")
            return replace(self, typed=None, filter_text=typed, error="", selected=0, follows=False, paused=False)
        return replace(self, typed=typed + key, error="") if len(key) == 1 and key.isprintable() else self
