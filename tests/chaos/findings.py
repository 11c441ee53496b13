"""The findings and counts of a chaos run."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Findings:
    """The findings, each with its time in the run, and the actions so far."""

    began_s: float = field(default_factory=time.monotonic)
    found: list[dict[str, Any]] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """Observations that are not findings by themselves."""

    def add(self, what: str, detail: str = "") -> None:
        at_s = round(time.monotonic() - self.began_s, 1)
        self.found.append({"at_s": at_s, "what": what, "detail": detail})
        self.say(f"FINDING {what}{': ' if detail else ''}{detail}")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began_s:7.1f}] {text}", flush=True)
