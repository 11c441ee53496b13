"""A finding of `rebpf check`: one thing that was checked, and what it means for the producer."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing checked; `exit_code` is 0 unless it keeps the producer from running or delivering.

    `available` is False if this host does not have it, whether the producer needs it or not. `warns` is True if it
    works now but will cause problems. The text includes the fix.
    """

    subject: str
    text: str
    exit_code: int = 0
    available: bool = True
    warns: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for JSON output."""
        return {
            "subject": self.subject,
            "ok": self.exit_code == 0,
            "warning": self.warns,
            "text": self.text,
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        label = "MISSING" if self.exit_code else "WARNING" if self.warns else "ok" if self.available else "no"
        return f"{label:7} {self.subject}: {self.text}"
