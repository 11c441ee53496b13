"""What a chaos run finds and counts."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Findings:
    """Findings with the second of the run, and what was done so far."""

    began_s: float = field(default_factory=time.monotonic)
    found: list[dict[str, Any]] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """What was seen and is no finding by itself."""

    def add(self, what: str, detail: str = "") -> None:
        at_s = round(time.monotonic() - self.began_s, 1)
        self.found.append({"at_s": at_s, "what": what, "detail": detail})
        self.say(f"FINDING {what}{': ' if detail else ''}{detail}")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began_s:7.1f}] {text}", flush=True)
