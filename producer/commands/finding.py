"""A finding of `rebpf check`: one thing that was examined, and what it means for a producer."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing examined; `exit_code` is 0 unless a producer could not run or deliver because of it.

    `there` is False for what this host does not offer, whether or not a producer needs it; `warns` is True for what
    works now and will hurt later. The text says what to do where something is to be done.
    """

    subject: str
    text: str
    exit_code: int = 0
    there: bool = True
    warns: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as it is printed in JSON."""
        return {
            "subject": self.subject,
            "ok": self.exit_code == 0,
            "warning": self.warns,
            "text": self.text,
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        label = "MISSING" if self.exit_code else "WARNING" if self.warns else "ok" if self.there else "no"
        return f"{label:7} {self.subject}: {self.text}"
